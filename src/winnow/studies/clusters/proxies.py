"""Possible predictors of the loss of a compressed model: errors of its weights, of its matrices' outputs, of its blocks and of
its logits; and of the importance of a column."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from winnow.models.architectures import Matrix, moments_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from winnow.io.artifacts import Bundle
    from winnow.models.files import ModelFiles
    from winnow.studies.clusters.found import MatrixErrors, OutputErrors


def matrix_of(module: nn.Module, inputs: int) -> Tensor:
    """W (out, in) in float64 of a module that is an affine map of `inputs` channels, whatever it stores."""
    parameter = next(module.parameters())
    with torch.no_grad():
        eye = torch.eye(inputs, dtype=parameter.dtype, device=parameter.device)
        zero = module(torch.zeros_like(eye[:1]))
        return (module(eye) - zero).T.double().cpu()


def matrix_errors(files: ModelFiles, moments: Bundle, checkpoint: Bundle, model: PreTrainedModel) -> MatrixErrors:
    """Mean relative squared errors of the matrices that a checkpoint replaces: `weights`, and `activations`, of their outputs on
    the calibration tokens with the dense model's inputs. Every matrix must be a separate module."""
    config = json.loads((checkpoint.directory / "config.json").read_text(encoding="utf-8"))
    replaced, held = config["quantization_config"]["layers"], (-1, dict[str, Tensor]())
    weights: list[float] = []
    activations: list[float] = []
    for matrix in (m for m in files.matrices if m.module in replaced):
        if held[0] != matrix.layer:
            held = (matrix.layer, moments.tensors(moments_file(matrix.layer)))
        weight, gram = files.weight(matrix), held[1][f"{matrix.site}.gram"].double()
        lost = weight - matrix_of(model.get_submodule(matrix.module), matrix.shape[1])
        weights.append(float(lost.square().sum() / weight.square().sum()))
        activations.append(float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum()))
    return {"weights": sum(weights) / len(weights), "activations": sum(activations) / len(activations)}


@torch.no_grad()
def output_errors(dense: PreTrainedModel, model: PreTrainedModel, blocks: list[str], windows: Tensor, batch: int) -> OutputErrors:
    """`blocks`: the squared error of a block's output with the dense model's inputs, relative to the square of the block's
    contribution, mean over blocks; `logits`: KL(dense || model), nats per token. On windows (count, length)."""
    sums, kl = torch.zeros(len(blocks), 2, dtype=torch.float64), 0.0

    def watch(index: int, name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            own, other = (o[0] if isinstance(o, tuple) else o for o in (output, model.get_submodule(name)(*args, **kwargs)))
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            sums[index] += torch.stack([(own - other).double().square().sum(), (own - hidden).double().square().sum()]).cpu()

        return dense.get_submodule(name).register_forward_hook(hook, with_kwargs=True)

    hooks = [watch(index, name) for index, name in enumerate(blocks)]
    device = next(dense.parameters()).device
    try:
        for ids in windows.split(batch):
            p, q = (of(input_ids=ids.to(device).long(), use_cache=False).logits.double().log_softmax(-1) for of in (dense, model))
            kl += float((p.exp() * (p - q)).sum())
    finally:
        for handle in hooks:
            handle.remove()
    return {"blocks": float((sums[:, 0] / sums[:, 1]).mean()), "logits": kl / windows.numel()}


@contextmanager
def without(model: PreTrainedModel, matrix: Matrix, column: int) -> Iterator[None]:
    """Context manager that sets one input channel of a matrix to 0."""

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., column] = 0
        return (x, *args[1:])

    handle = model.get_submodule(matrix.module).register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def losses_without(model: PreTrainedModel, matrix: Matrix, columns: list[int], windows: Tensor) -> list[float]:
    """KL (nats per token) between the model and the model with one input channel of the matrix set to 0, for every channel in
    `columns`, on windows (count, length)."""
    ids = windows.to(next(model.parameters()).device).long()
    reference = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    found = []
    for column in columns:
        with without(model, matrix, column):
            logits = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        found.append(float((reference.exp() * (reference - logits)).sum()) / windows.numel())
    return found
