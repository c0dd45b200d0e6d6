"""Evaluations of a checkpoint, as its card shows them, and as a hub reads them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.io.artifacts import file_digest
from winnow.io.local_paths import named

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from winnow.evaluation.results import LossResult


@dataclass(frozen=True)
class Measured:
    """One evaluation of a checkpoint: the results of `evaluate_perplexity` for it and for the dense model.

    `text`: name of the text, and `source`: its preset (`dataset`, `subset`, `split`, `revision`), as `text_of` finds them."""

    evaluation: str
    compressed: LossResult
    dense: LossResult
    text: str | None = None
    source: dict[str, Any] | None = None


def text_of(result: dict[str, Any], folders: list[Path]) -> tuple[str | None, dict[str, Any] | None]:
    """(name, preset) of the text that a result was measured on, from the provenance of its tokens and of their text; both None if
    these are no longer there. `folders`: where the paths of the run may be relative to."""
    tokens = _input(result["provenance"]["inputs"], "/tokens/", folders)
    text = tokens and _input(_provenance(tokens)["inputs"], "/texts/", folders)
    if not text:
        return None, None
    made = _provenance(text)
    return text.stem.rpartition("-")[0], made["params"]["spec"]


def _input(inputs: dict[str, str], part: str, folders: list[Path]) -> Path | None:
    """The file among the inputs of a job with `part` in its path, if it is still the one that the job read."""
    places = [(folder / name, digest) for name, digest in inputs.items() if part in name for folder in folders]
    return next((path for path, digest in places if path.is_file() and file_digest(path) == digest), None)


def _provenance(path: Path) -> dict[str, Any]:
    """What a safetensors or a Parquet file of winnow says of the job that made it."""
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return json.loads(pq.read_metadata(path).metadata[b"winnow"])
    from safetensors import safe_open

    with safe_open(path, framework="np") as stream:
        return json.loads(stream.metadata()["winnow"])["provenance"]


METRICS = {  # {name in a result: (type, name with its unit)}
    "perplexity": ("perplexity", "perplexity"),
    "nll": ("loss", "loss, nats per token"),
    "delta_nll": ("loss_above_dense", "loss above the dense model, nats per token"),
    "kl": ("kl_divergence", "KL divergence to the dense model, nats per token"),
    "top1_agreement": ("top1_agreement", "share of tokens with the dense model's most probable next token"),
}


def eval_results(measured: list[Measured]) -> list[EvalResult]:
    """The numbers of the compressed model for the `model-index` of a card. The data set is the one on the hub; for a text in
    files it is the name of the text, or of the evaluation if the text is not known."""
    from huggingface_hub import EvalResult

    found = []
    for m in measured:
        own, source = m.compressed, named(m.source or {})
        protocol = own["protocol"]
        facts = {
            "evaluation": m.evaluation,
            "protocol": f"{protocol['protocol']} version {protocol['protocol_version']}",
            "length": protocol["length"],
            "windows": own["windows"],
            "tokens": own["tokens"],
            "dtype": protocol["dtype"],
        }
        text = m.text or m.evaluation
        for key, (kind, name) in METRICS.items():
            if key in own:
                error = own.get(f"{key}_se")
                found.append(
                    EvalResult(
                        task_type="text-generation",
                        dataset_type=source.get("dataset") or text,
                        dataset_name=text,
                        dataset_config=source.get("subset"),
                        dataset_split=source.get("split") if source.get("dataset") else None,
                        dataset_revision=source.get("revision"),
                        metric_type=kind,
                        metric_name=name,
                        metric_value=own[key],  # type: ignore[literal-required]
                        metric_args=facts | ({} if error is None else {"standard_error": error}),
                    )
                )
    return found
