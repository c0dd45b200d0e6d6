"""What a model's files and a text's rows suggest for a configuration: dtype, windows, and how a text is split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.calibration.few_tokens import ENOUGH
from winnow.data.text_formats import text_format_of
from winnow.data.texts import read_rows
from winnow.data.tokens import check_causal, encode, load_tokenizer
from winnow.errors import InputError
from winnow.models.classes import is_causal, model_class, read_config
from winnow.models.gguf import GgufModel, gguf_file
from winnow.models.shape import Shape, shape_of
from winnow.planning.config import Text

if TYPE_CHECKING:
    from winnow.io import specs

SMALL = 1e9  # numbers; smaller models run in float32
SHORT, LONG = 1024, 2048  # tokens of a window, of small models and of others
FEWEST, TOKENS = 32, 1 << 16  # windows and tokens of a calibration at least, unless the text has fewer
SPLIT, ROWS = 0.9, 10  # share of the rows for calibration, where one text is for both; rows that it needs to be split
LOOKED_AT = 1 << 18  # characters of a text that are tokenized to estimate its tokens
SURE = 0.9  # of the estimate are relied on


@dataclass(frozen=True)
class Suggested:
    """A model: its shape (None on a hub), its class, the dtype of its forward passes and the length of its windows."""

    shape: Shape | None
    architecture: str
    dtype: str
    length: int


def of_model(source: str, revision: str | None) -> Suggested:
    """Read the config and the headers of the weights. Raises InputError for a directory that a run would refuse, and for a model
    that does not predict the next token."""
    if revision is not None:
        return Suggested(None, "a model on the hub", "bfloat16", LONG)
    file = gguf_file(source)
    shape, config = shape_of(Path(source)), GgufModel(file).config if file else read_config(source)
    architecture = model_class(config).__name__ if file else (config.architectures or ["?"])[0]
    check_causal({"causal": is_causal(config), "class": architecture})  # type: ignore[typeddict-item]
    text = config.get_text_config()
    small = shape.numbers < SMALL
    stored = GgufModel(file).dtype if file else str(text.dtype or config.dtype or "").removeprefix("torch.")
    dtype = "float32" if small or stored not in ("bfloat16", "float16") else stored
    return Suggested(shape, architecture, dtype, min(SHORT if small else LONG, text.max_position_embeddings or LONG))


def precision_of(suggested: Suggested) -> dict[str, str]:
    """For large models, statistics of half the bytes."""
    large = suggested.shape is None or suggested.shape.numbers >= SMALL
    return {"precision": "float32"} if large else {}


def windows_of(suggested: Suggested) -> int:
    """As many calibration windows as give the widest input, with that of an FFN, enough tokens per channel."""
    shape = suggested.shape
    if shape is None:
        return 256
    widest = max(shape.sites().values()) + shape.width
    return max(FEWEST, math.ceil(max(TOKENS, ENOUGH * widest) / suggested.length))


def texts_of(given: Sequence[str], evaluated: Sequence[str], root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(text of calibration, text of evaluation) as presets: those given; one text split by rows; or those of the demo. Raises
    InputError for files that are not read, and for a text with too few rows to be split."""
    if not given:
        folder = root / "resources" / "texts" / "demo"
        folder = folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder
        return {"files": [str(folder / "calibration.jsonl")]}, {"files": [str(folder / "evaluation.jsonl")]}
    if evaluated:
        return _text(given), _text(evaluated)
    text = _text(given)
    count = len(rows_of(text))
    if count < ROWS:
        raise InputError(
            f"{', '.join(given)}: {count} rows, too few to keep some for evaluation; give another text by --eval-text"
        )
    cut = round(SPLIT * count)
    return text | {"stop": cut}, _text(given) | {"start": cut}


def _text(files: Sequence[str]) -> dict[str, Any]:
    """A text of local files; of plain text, the lines are the rows."""
    lines = {"format": "lines"}
    try:
        form = text_format_of(files, None)
    except ValueError:  # a file that may be read in two ways
        form = text_format_of(files, "lines")
    return {"files": [*files], **(lines if form in ("raw", "lines") else {})}


def rows_of(text: dict[str, Any]) -> list[str]:
    spec: specs.Text = Text.model_validate(text).model_dump(mode="json")  # type: ignore[assignment]
    return read_rows(spec)


def tokens_of(text: dict[str, Any], model: str) -> int:
    """About how many tokens a text has for a model's tokenizer, from its beginning."""
    whole = Text.model_validate(text).join.join(rows_of(text))
    part = whole[:LOOKED_AT]
    file = gguf_file(model)
    tokenizer = GgufModel(file).tokenizer() if file else load_tokenizer(model)
    return int(SURE * len(encode(tokenizer, part, True)) * len(whole) / len(part))
