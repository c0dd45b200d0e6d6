"""A model compressed in memory, by the functions of the workflow's stages in the order of its rules."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from winnow.allocation.groups import allocate, chosen_groups, experts_left_dense, summarize
from winnow.allocation.runtimes import check_sizes
from winnow.api.given import as_it_was, checked, loaded
from winnow.calibration.clusters import assign_all
from winnow.calibration.few_tokens import few_tokens
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.outer import collect_outer
from winnow.calibration.reader import Held
from winnow.calibration.statistics import collect
from winnow.checkpoint.in_memory import put
from winnow.checkpoint.writer import Compressed as Stored
from winnow.checkpoint.writer import compressed, recipe_of, write_checkpoint
from winnow.errors import InputError, absent, missing
from winnow.factors.fit import fit_groups, labels_by_matrix, left_dense, storable
from winnow.factors.predict import predict
from winnow.io.artifacts import atomic
from winnow.metrics.base import METRICS
from winnow.models.architectures import OUTER, moments_file, reaches_outer
from winnow.planning.config import load
from winnow.planning.labels import Labels

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedModel

    from winnow.io.records import GroupRecord, Provenance
    from winnow.models.files import ModelFiles
    from winnow.structures.base import Structure

log = logging.getLogger(__name__)
STATISTICS, GRADIENTS = 4096, 2048  # tokens of a batch, as `batch_tokens` of the rules: they change rounding alone


@dataclass(frozen=True)
class Report:
    """What `compress` chose and stored."""

    method: str
    dense_bytes: int  #: of the chosen matrices
    stored_bytes: int  #: of what replaces them
    keep_bytes: float  #: stored over dense bytes
    predicted: float | None  #: increase of the loss, nats per token; None where the method does not predict it
    groups: list[GroupRecord]  #: a row per group of matrices: `group`, `size` (None: dense), bytes, errors, `predicted`
    left_dense: dict[str, int]  #: {group of experts outside of the budget: its calibration tokens, which are too few}
    seconds: dict[str, float]  #: of every stage

    def table(self) -> pd.DataFrame:
        """The groups as a table."""
        import pandas as pd

        return pd.DataFrame(self.groups)


@dataclass(frozen=True)
class Compressed:
    """A compressed model in memory (`model`), and how it was made (`report`)."""

    model: PreTrainedModel
    report: Report
    _files: ModelFiles = field(repr=False)
    _stored: list[Stored] = field(repr=False)
    _recipe: Any = field(repr=False)

    def save(self, directory: str | Path) -> Path:
        """Write a checkpoint that `from_pretrained` loads after `import winnow`, as the workflow does: matrices in the dtype of
        the dense weights, configuration, card and recipe; and the tokenizer, if the model was given as a directory. Raises
        InputError if the directory exists."""
        directory = Path(directory)
        if directory.exists():
            raise InputError(f"{directory}: exists already; use a new directory")
        params: Any = {"spec": {}, "code": [], "versions": {"winnow": version("winnow")}, "files": {}}
        provenance: Provenance = {"rule": "winnow.compress", "wildcards": {}, "params": params, "inputs": {}}
        dtype = str(self.model.dtype).removeprefix("torch.")
        with atomic(directory) as folder:
            write_checkpoint(folder, self._files, self._stored, dtype, self._recipe, provenance)
        return directory


def compress(
    model: str | Path | PreTrainedModel,
    windows: Any,
    method: str | Mapping[str, Any] = "winnow",
    keep_bytes: float = 0.4,
    *,
    targets: Sequence[str] = ("ffn", "attention"),
    nearest: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> Compressed:
    """Compress the matrices of a model to a share of their bytes.

    Parameters
    ----------
    model
        A directory in Hugging Face layout, a GGUF file, which is dequantised into a temporary folder, or a model of transformers,
        which is left as it is: its copy is compressed.
    windows
        Token ids of a calibration text, integers (windows, length); see `calibration_windows`.
    method
        The name of a preset, or the content of one: `{"structure": ..., "metric": ...}`, and `"allocation"` if it has its own.
    keep_bytes
        Stored over dense bytes of the chosen matrices, met within 0.5 %.
    targets
        The matrices: `ffn`, `attention`, `embeddings`, `head`, or roles such as `q_proj`.
    nearest
        Store the nearest bytes that the method can, instead of an error, if it cannot meet `keep_bytes`.
    dtype
        Of the forward passes, for a model that is given as a directory.
    device
        Where it runs then.
    seed
        Of the labels that are sampled for gradients, as the `seed` of a calibration.

    Too few calibration tokens for the width of an input are a warning in the log `winnow.api.compression`. The model, its copy
    and all statistics are in memory at once; the workflow reads models that are larger block by block.

    Raises
    ------
    InputError
        For an unknown method, windows that do not fit the model, bytes that the method cannot store, and weights or statistics
        that are not finite; for an allocation with jobs of its own (`learned`, `rounds`, `time`), which only the workflow runs.
    """
    call = _Call(*_planned(method, {"keep_bytes": keep_bytes, "targets": list(targets), "nearest": nearest}, dtype, seed))
    try:
        return call.run(model, windows, dtype, device)
    except ModuleNotFoundError as error:
        if library := missing(error):
            raise InputError(f"winnow.compress: {absent(library)}") from error
        raise


def _planned(method: Any, budget: dict[str, Any], dtype: str, seed: int) -> tuple[Labels, str]:
    """The presets as the workflow resolves them, and the method's name. Raises InputError as for a configuration file."""
    named = isinstance(method, str)
    experiment = {"models": ["model"], "calibrations": ["windows"], "budgets": ["asked"], "evaluations": ["windows"]}
    content = {
        "models": {"model": {"source": "model", "dtype": dtype}},
        "texts": {text: {"files": [text], "format": "raw"} for text in ("calibration", "evaluation")},
        "calibrations": {"windows": {"text": "calibration", "seed": seed}},
        "methods": {} if named else {"method": dict(method)},
        "budgets": {"asked": budget},
        "evaluations": {"windows": {"text": "evaluation"}},
        "experiments": {"compress": {**experiment, "methods": [method if named else "method"], "controls": False}},
    }
    return Labels(load(content)), method if named else "method"


class _Call:
    """One call of `compress`: its presets, and the seconds of its stages."""

    def __init__(self, plan: Labels, name: str):
        self.plan, self.name = plan, name
        budget = plan.spread_by(name, "asked")
        self.budget = plan.config.budgets[budget]
        allocation = plan.allocation(plan.labels["budgets"][budget])
        if allocation.learns or allocation.rounds() or allocation.timing():
            raise InputError(f"allocation {allocation.kind()!r}: needs jobs of its own; use the workflow, or another allocation")
        self.outer = reaches_outer(self.budget.targets)
        self.predicts, self.runtime = allocation.predicts(), allocation.runtime()
        self.structure = plan.structure(plan.labels["methods"][name])
        members = [plan.labels["methods"][member] for member in plan.members[name]]
        self.members = dict(zip(self.structure.alternatives() if members[1:] else [""], members, strict=True))
        self.seed = plan.config.calibrations["windows"].seed
        self.seconds: dict[str, float] = {}

    def run(self, given: Any, windows: Any, dtype: str, device: str) -> Compressed:
        import pandas as pd

        with self._timed("load"):
            files, dense = loaded(given, dtype, device)
            ids = checked(windows, dense)
            check_sizes(self.structure, files.every, self.budget.targets, self.runtime)
        statistics = self._statistics(files, dense, ids)
        factors, spectra, losses, left = self._factors(files, statistics, str(dense.device))
        with self._timed("compress"):
            predicted = pd.DataFrame.from_dict(losses, orient="index") if self.predicts else None
            groups = chosen_groups(files, self.structure, self.budget.targets, spectra, predicted)
            budget: Any = self.budget.model_dump()
            sizes = allocate(groups, budget).sizes
            record = summarize(groups, sizes)
            record["left_dense"] = {
                name: left[name] for name in experts_left_dense(files, self.structure, self.budget.targets, spectra)
            }
            stored = list(compressed(files, factors, self.structure, sizes))
            model = _with(dense, stored)
        recipe = recipe_of({"model": _called(given), "method": self.name}, self._presets(given, dense, ids, budget), record)
        report = Report(
            method=self.name,
            dense_bytes=record["dense_bytes"],
            stored_bytes=record["stored_bytes"],
            keep_bytes=record["keep_bytes"],
            predicted=record.get("predicted"),
            groups=record["groups"],
            left_dense=record["left_dense"],
            seconds=self.seconds,
        )
        return Compressed(model, report, files, stored, recipe)

    def _statistics(self, files: ModelFiles, dense: PreTrainedModel, ids: Tensor) -> dict[str, Held]:
        """Second moments of inputs and of gradients, as far as the method needs them."""
        needs = set().union(*(self.plan.needs(member) for member in self.members.values()))
        needs |= {"moments", "gradients"} if self.predicts else set()
        clusterings = [self.plan.structure(member).clustering() for member in self.members.values()]
        needs |= {"moments"} if any(clustering and clustering.needs() for clustering in clusterings) else set()
        found: dict[str, Held] = {}
        with as_it_was(dense):
            if "moments" in needs:
                with self._timed("collect_statistics"):
                    batch = max(1, STATISTICS // ids.shape[1])
                    found["moments"] = _held(collect(dense, files.matrices, ids, batch, torch.float64))
                inputs = {(m.layer, m.site): m.shape[1] for m in files.matrices}
                for line in few_tokens(_counted(found["moments"], inputs), len(ids)):
                    log.warning(line)
            if "gradients" in needs:
                with self._timed("collect_gradients"):
                    options: Any = (max(1, GRADIENTS // ids.shape[1]), torch.float64, "model", self.seed)
                    found["gradients"] = _held(collect_gradients(dense, files.matrices, ids, *options))
            if self.outer and needs:
                with self._timed("collect_outer"):
                    options = (max(1, GRADIENTS // ids.shape[1]), torch.float64, "model", self.seed)
                    found["outer"] = _held(collect_outer(dense, files.outer, ids, *options))
        return found

    def _factors(
        self, files: ModelFiles, statistics: Mapping[str, Held], device: str
    ) -> tuple[dict[str, Any], pd.DataFrame, dict[str, Any], dict[str, int]]:
        """(fits of all members by name, their sizes and errors, predicted losses, {experts left dense: tokens})"""
        import pandas as pd

        moments, gradients = (statistics.get(part) for part in ("moments", "gradients"))
        x: Any = moments
        g: Any = gradients
        outer: Any = statistics.get("outer")
        shards = {"1-of-1": x, OUTER: outer} if self.outer else {"1-of-1": x}
        factors: dict[str, Any] = {}
        rows: dict[str, dict[str, Any]] = {}
        losses: dict[str, dict[str, Any]] = {}
        left: dict[str, int] = {}
        for suffix, label in self.members.items():
            structure, preset = self.plan.structure(label), self.plan.preset("methods", label)
            metric = METRICS.build(preset.metric.model_dump()) if preset.metric else None
            fits: dict[str, Any] = {}
            with self._timed("factorize"):
                labels = _clusters(files, moments, structure)
                for shard, own in shards.items():
                    for name, fit, numbers in fit_groups(files, own, g, labels, structure, metric, shard, device):
                        held = storable(structure, fit) | {"numbers": torch.tensor(numbers)}
                        fits[name] = Held({f"{name}.safetensors": held})
                        rows[f"{name}{suffix}"] = {"numbers": numbers, "error": fit.error.tolist()}
                left |= left_dense(files, x, structure, metric, "1-of-1")
            if self.predicts:
                with self._timed("predict_losses"):
                    for name, predicted in predict(files, x, g, fits, structure, device, outer):
                        losses[f"{name}{suffix}"] = {"predicted": predicted.tolist()}
            factors |= {f"{name}{suffix}": held for name, held in fits.items()}
        return factors, pd.DataFrame.from_dict(rows, orient="index"), losses, left

    def _presets(self, given: Any, dense: PreTrainedModel, ids: Tensor, budget: dict[str, Any]) -> Any:
        """What recipe.yaml says of the call."""
        method = self.plan.config.methods[self.name].model_dump(exclude={"paper"})
        return {
            "model": {"source": _called(given), "dtype": str(dense.dtype).removeprefix("torch.")},
            "calibration": {
                "text": "windows given to winnow.compress",
                "windows": len(ids),
                "length": ids.shape[1],
                "seed": self.seed,
            },
            "calibration_text": {},
            "method": method,
            "budget": budget,
        }

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - began
        log.info("%s: %.1f s", stage, self.seconds[stage])


def _held(found: Iterator[tuple[int, dict[str, dict[str, Tensor]]]]) -> Held:
    """Statistics by layer, under the names of their files."""
    layers = {
        moments_file(layer): {f"{place}.{name}": value for place, values in sites.items() for name, value in values.items()}
        for layer, sites in found
    }
    return Held(layers)


def _counted(moments: Held, inputs: Mapping[tuple[int, str], int]) -> Iterator[tuple[str, int, int]]:
    """(site, width, counted tokens) of every input, whose widths are given by layer and site."""
    for (layer, site), width in inputs.items():
        yield site, width, int(moments.tensors(moments_file(layer))[f"{site}.count"])


def _clusters(files: ModelFiles, moments: Held | None, structure: Structure) -> dict[str, Tensor]:
    """{matrix: labels (channels,)} where the structure clusters channels."""
    import pandas as pd

    clustering = structure.clustering()
    if clustering is None:
        return {}
    given: Any = moments
    return labels_by_matrix(pd.concat(pd.DataFrame(part) for part in assign_all(files, given, clustering)))


def _with(dense: PreTrainedModel, stored: list[Stored]) -> PreTrainedModel:
    """A copy of the dense model with what is stored in the place of its matrices."""
    model = copy.deepcopy(dense)
    tensors = {module: parts for group in stored for module, parts in group.stored.items()}
    put(model, tensors, {module: layout for group in stored for module, layout in group.layouts.items()})
    return model.eval()


def _called(model: Any) -> str:
    return str(model) if isinstance(model, str | Path) else type(model).__name__
