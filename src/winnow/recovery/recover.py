"""Loads a checkpoint (or the dense model) for a recovery, and writes the recovered model as a checkpoint of the same size."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from safetensors import safe_open
from torch import Tensor

from winnow.calibration.reader import Layers, Statistics
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.errors import InputError
from winnow.io.artifacts import Bundle, write_manifest
from winnow.io.local_paths import named, without_local
from winnow.io.records import sizes_of
from winnow.io.resume import Resume
from winnow.models.architectures import blocks_of
from winnow.models.files import ModelFiles, weight_files
from winnow.models.weights import SHARD_BYTES, copy_files, write_weights
from winnow.numerics.linalg import regularized
from winnow.recovery.base import Given
from winnow.recovery.weights import ByBlock, Weights

if TYPE_CHECKING:
    from winnow.jobs.start import Job

RIDGE = 1e-6  # added to the metric of outputs, as a share of its mean


def given_of(
    files: ModelFiles,
    checkpoint: Bundle | None,
    windows: Tensor,
    options: Any,
    first_token: bool,
    device: str,
    resume: Resume | None = None,
    gradients: Layers | None = None,
    stream: bool = False,
) -> Given:
    """What a recovery is given: a checkpoint (of a compressed or a recovered dense model), or, with None, the dense model. Both
    models are in float32, as updates are lost in 16 bits. `gradients`: gradient statistics, for options that need them.
    `stream`: whether blocks are read when they are needed, and kept by `resume` once they are trained."""
    both, weights = (files.verify(), checkpoint.verify() if checkpoint else files.directory), Weights()
    if stream:
        assert resume is not None
        other, own = (Streamed(one, "float32", device, resume.path, windows.shape[1]) for one in both)
        dense, model, weights = other.model, own.model, ByBlock(own, other, resume)
    else:
        dense, model = (load_model(one, "float32", device) for one in both)
    modules = [m.module for m in files.matrices]
    if checkpoint:
        config = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
        modules = list(config.get("quantization_config", {}).get("layers", modules))
    dtypes = {name: tensor.dtype for name, tensor in _stored(files, checkpoint)}
    blocks = blocks_of(files.manifest["model_type"], files.tensors)
    for each in (model, dense):
        each.requires_grad_(False)
    outputs = _metric_of_outputs(files, gradients, device) if gradients else None
    return Given(model, dense, windows, blocks, modules, dtypes, options, first_token, resume, outputs, weights=weights)


def _metric_of_outputs(files: ModelFiles, gradients: Layers, device: str) -> Callable[[str], Tensor]:
    """module -> R (m, m), as in the metric `two_sided`. Raises InputError, naming the module, if it is zero or missing."""
    statistics = Statistics(gradients, device)
    matrices = {matrix.module: matrix for matrix in files.matrices}

    def of(module: str) -> Tensor:
        matrix = matrices[module]
        if matrix.expert is not None:
            raise InputError(f"{module}: there are no gradient statistics of experts; use `outputs: equal`")
        statistics.keep([matrix])
        try:
            gram = statistics.of(matrix, matrix.role, ["gradient_gram"])["gradient_gram"]
            return regularized(gram, RIDGE, "the second moment of the output gradient")
        except FloatingPointError as error:
            raise InputError(f"{module}: {error}") from error

    return of


def _stored(files: ModelFiles, checkpoint: Bundle | None) -> Iterator[tuple[str, Tensor]]:
    """Every stored tensor by its canonical name."""
    if checkpoint is None:
        for name in files.tensors:
            yield name, files.tensor(name)
        return
    for file in weight_files(checkpoint.directory):
        with safe_open(checkpoint.path(file.name), framework="pt") as stream:
            for name in stream.keys():
                yield name, stream.get_tensor(name)


def _recovered(files: ModelFiles, checkpoint: Bundle | None, given: Given) -> Iterator[tuple[str, Tensor]]:
    """Every tensor to be stored: trainable ones from the model, the others unchanged."""
    trained = given.weights.trained(given)
    for name, tensor in _stored(files, checkpoint):
        changed = trained(name)
        yield name, tensor if changed is None else changed.to("cpu", tensor.dtype)


def write_recovered(
    directory: Path,
    files: ModelFiles,
    checkpoint: Bundle | None,
    given: Given,
    recovery: dict[str, Any],
    report: dict[str, Any],
    job: Job,
) -> None:
    """Write the recovered model as a checkpoint with the same tensors, shapes and dtypes as before the recovery. Its card is
    written by `cards` beside it, and by `winnow share` into a copy, so that editing the card's text does not repeat training.

    `recovery`: name and options; `report`: the content of recovery.json. Raises RuntimeError if the number of bytes differs."""
    directory.mkdir(parents=True)
    total = write_weights(directory, _recovered(files, checkpoint, given), SHARD_BYTES)
    sizes = sizes_of(checkpoint.manifest) if checkpoint else files.sizes()
    if total != sizes["model_stored_bytes"]:
        raise RuntimeError(f"{total} bytes after the recovery, but {sizes['model_stored_bytes']} before")
    source = checkpoint.directory if checkpoint else files.directory
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for key in ("torch_dtype", "auto_map"):
        config.pop(key, None)
    config = without_local(config) | {"dtype": job.spec["dtype"]}
    (directory / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    copy_files(files.manifest["files"], files.directory, directory)
    if (source / "recipe.yaml").is_file():
        recipe = yaml.safe_load((source / "recipe.yaml").read_text(encoding="utf-8")) | {"recovery": recovery}
        (directory / "recipe.yaml").write_text(yaml.safe_dump(named(recipe), sort_keys=False), encoding="utf-8")
    (directory / "recovery.json").write_text(json.dumps({**recovery, **report}, indent=1, allow_nan=False) + "\n", "utf-8")
    write_manifest(directory, sizes, job.provenance)
