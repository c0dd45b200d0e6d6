"""Windows of token ids, for calibration and for evaluation; the named perplexity protocols."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from winnow.errors import InputError, first_line
from winnow.io.records import ModelManifest
from winnow.models.classes import read_config

log = logging.getLogger(__name__)

PAD = -1
CURE = "put the tokenizer files (tokenizer.json; or vocab.txt; vocab.json and merges.txt; *.model) beside the weights"


@dataclass(frozen=True)
class Protocol:
    """How a text is cut into windows, and which tokens are scored. A changed rule gets a new version."""

    version: int
    special_tokens: bool
    bos_each_window: bool
    overlap: bool
    rule: str


PROTOCOLS = {
    "p1": Protocol(
        1, True, False, False,
        "Rows joined, tokenizer defaults (one leading BOS if it adds one); windows do not overlap, an incomplete last one is "
        "dropped; all tokens but the first of a window are scored (GPTQ, SparseGPT, SVD-LLM, SliceGPT).",
    ),
    "p1_bos": Protocol(
        1, False, True, False,
        "As p1 without leading BOS, but with a BOS before every window, which then has length - 1 tokens of text, all scored "
        "(ASVD's use_bos; needed for Gemma).",
    ),
    "p2": Protocol(
        1, True, False, True,
        "Windows advance by `stride` and score only tokens not scored before; the short last window is kept (the "
        "transformers guide).",
    ),
    "plain": Protocol(1, False, False, False, "As p1, but no special token is ever added."),
}  # fmt: skip


def load_tokenizer(directory: Path | str) -> Any:
    """The tokenizer of a model directory. Raises InputError if it is missing or unusable: without vocabulary files, transformers
    creates one that only knows special tokens, and a token without an embedding makes the model fail."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library tokenizers raises plain Exception
        raise InputError(f"{directory}: no usable tokenizer ({first_line(error)}); {CURE}") from error
    vocabulary, rows = tokenizer.get_vocab(), read_config(directory).get_text_config().vocab_size
    if vocabulary.keys() <= tokenizer.get_added_vocab().keys():
        raise InputError(f"{directory}: the tokenizer has no vocabulary, only {len(vocabulary)} special tokens; {CURE}")
    token = max(vocabulary, key=lambda token: vocabulary[token])
    if vocabulary[token] >= rows:
        raise InputError(
            f"{directory}: the tokenizer has the id {vocabulary[token]} for {token!r}, but the model has embeddings of {rows} "
            "tokens; use this model's own tokenizer, remove the token from it, or save the model after resize_token_embeddings"
        )
    return tokenizer


def encode(tokenizer: Any, text: str, special_tokens: bool) -> np.ndarray:
    """All token ids of a text, int32. Raises InputError if there are none, or if most are unknown tokens."""
    ids, empty = (tokenizer(part, add_special_tokens=special_tokens, verbose=False).input_ids for part in (text, ""))
    if text.strip() and len(ids) == len(empty):
        raise InputError(f"the tokenizer outputs no token for the text that begins {text.strip()[:60]!r}")
    check_known(tokenizer, [ids], empty)
    return np.array(ids, dtype=np.int32)


def check_known(tokenizer: Any, rows: Sequence[list[int]], empty: Sequence[int] = ()) -> None:
    """Raise InputError if most tokens of all rows (of ids) are unknown; `empty`: the special tokens that every row contains."""
    unknown = tokenizer.unk_token_id
    missed = sum(row.count(unknown) for row in rows) - len(rows) * list(empty).count(unknown)
    total = sum(map(len, rows)) - len(rows) * len(empty)
    if unknown is not None and 2 * missed > total:
        raise InputError(
            f"{missed:,} of {total:,} tokens of the text are unknown to the tokenizer ({tokenizer.unk_token}); it is for another "
            "language or another model, or its vocabulary is damaged"
        )


def check_different(rows: Sequence[Any], what: str) -> None:
    """Raise InputError if several rows of ids are all identical: they would be counted as independent."""
    if len(rows) > 1 and all(list(row) == list(rows[0]) for row in rows):
        raise InputError(f"all {len(rows)} {what} have the same tokens; check the text and the tokenizer")


def check_length(length: int, longest: int | None) -> None:
    if longest is not None and length > longest:
        raise InputError(f"windows of {length} tokens are longer than the model's {longest} positions; lower `length`")


def check_causal(model: ModelManifest) -> None:
    """Raise InputError if a retrieved model (its manifest) has no perplexity."""
    if not model["causal"]:
        raise InputError(
            f"perplexity is the loss of next-token prediction, which {model['class']} does not do; evaluate an encoder on a "
            "classification task, or set is_decoder in its config.json if it was trained as a decoder"
        )


def calibration_windows(ids: np.ndarray, windows: int, length: int, seed: int) -> np.ndarray:
    """`windows` of the non-overlapping windows of `ids`, sampled without replacement with `seed`, in text order."""
    have = len(ids) // length
    if have < windows:
        raise InputError(
            f"the calibration text has {len(ids):,} tokens: {have} windows of {length}, but {windows} are requested; "
            "use a longer text, or lower `windows` or `length`"
        )
    chosen = np.sort(np.random.default_rng(seed).permutation(have)[:windows])
    found = ids[: have * length].reshape(have, length)[chosen]
    check_different(list(found), "calibration windows")
    return found


def evaluation_windows(
    ids: np.ndarray, protocol: str, length: int, stride: int | None, windows: int | None, bos: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids (windows, length) int32 padded with PAD, index of the first scored token of each window) of a protocol."""
    rule = PROTOCOLS[protocol]
    if rule.overlap:
        assert stride is not None
        rows, first, scored = [], [], 1
        for begin in range(0, len(ids), stride):
            end = min(begin + length, len(ids))
            rows.append(np.pad(ids[begin:end], (0, length - (end - begin)), constant_values=PAD))
            first.append(scored - begin)
            scored = end
            if end == len(ids):
                break
        cut, start = np.stack(rows), np.array(first, dtype=np.int32)
    else:
        content = length - rule.bos_each_window
        count = len(ids) // content
        cut = ids[: count * content].reshape(count, content)
        if rule.bos_each_window:
            if bos is None:
                raise InputError(f"protocol {protocol} puts a BOS token before every window, but the tokenizer has none")
            cut = np.concatenate([np.full((count, 1), bos, dtype=np.int32), cut], axis=1)
        start = np.ones(count, dtype=np.int32)
    wanted = windows or 2
    if len(cut) < wanted:
        raise InputError(
            f"the evaluation text has {len(ids):,} tokens: {len(cut)} windows of {length}, but {wanted} are needed; "
            "use a longer text, or lower `windows` or `length`"
        )
    check_different(list(cut[:windows]), "evaluation windows")
    return cut[:windows], start[:windows]
