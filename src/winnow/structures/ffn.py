"""Base class of structures that replace a whole FFN, including FFNs in which gate and up are one matrix (Phi-3)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from winnow.models.architectures import Matrix, ffn_groups
from winnow.numerics.operations import Operations
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn

FUSED = "gate_up_proj"


def statistics_of(criterion: str) -> tuple[str, ...]:
    """The statistics that a criterion needs: of the hidden units, and of the gradient of the loss at the output."""
    if criterion == "loss":
        return ("gram", "gradient_gram")
    needs = {"activation": ("rms",), "activation_x_row": ("rms",), "lowest": ("rms",), "leverage": ("gram",), "output": ("gram",)}
    return needs.get(criterion, ())


class FfnStructure(Structure):
    """Fits gate, up and down of a layer together, and stores their biases itself.

    Subclasses receive [gate, up, down] or [up, down] in `count`, `fit_ffn`, `store_ffn` and `part_module`. A fused matrix of gate
    above up is split before and joined afterwards: its module outputs both, concatenated."""

    bias_name = None

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        return ffn_groups(matrices)

    def limit(self, group: list[Matrix]) -> int:
        return group[-1].shape[1]  # the neurons

    def judged(self, group: list[Matrix]) -> list[Matrix]:
        return group[-1:]

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """As in `Structure`, but with the memory of the neurons' second moments and factors, and of the matrices."""
        _, operations, cached = super().work(group, needs)
        (d, f), weights = group[-1].shape, sum(m.shape[0] * m.shape[1] for m in group)
        return 8.0 * (5.5 * f * f + weights + 2 * d * f), operations, cached

    def predicting(self, group: list[Matrix]) -> float:
        (d, f), weights = group[-1].shape, sum(m.shape[0] * m.shape[1] for m in group)
        return 8.0 * (8 * f * f + weights + 2 * d * f)

    def control(self) -> StructureOptions | None:
        """The same with randomly selected neurons, if the options have a criterion."""
        criterion = getattr(self.options, "criterion", "random")
        return None if criterion == "random" else self.options.model_copy(update={"criterion": "random"})

    @abstractmethod
    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        """Like `numbers`."""

    @abstractmethod
    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        """Like `fit`."""

    def layouts_ffn(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        """Like `layouts`."""
        return super().layouts(group, size)

    @abstractmethod
    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        """Like `stored`."""

    @staticmethod
    @abstractmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        """Like `module`."""

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return self.count(parts_of(group), size, tensors)

    def fit(self, problem: Problem, largest: int) -> Fit:
        return self.fit_ffn(parted(problem), largest)

    def layouts(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        found = self.layouts_ffn(parts_of(group), size)
        for m in (m for m in group if m.role == FUSED):
            halves = {half: found.pop(f"{m.module}.{half}") for half in ("gate", "up")}
            found[m.module] = {"kind": self.kind(), "fused": halves}
        return found

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        import torch

        found = self.store_ffn(parts_of(group), tensors, size)
        for m in group:
            if m.role == FUSED:
                halves = {half: found.pop(f"{m.module}.{half}") for half in ("gate", "up")}
                own = {f"{half}.{name}": t for half, part in halves.items() for name, t in part.tensors.items()}
                own["weight"] = torch.empty(0)
                layout = {"kind": self.kind(), "fused": {half: part.layout for half, part in halves.items()}}
                found[m.module] = Part(layout, own)
        return found

    @classmethod
    def module(cls, layout: dict[str, Any], dense: nn.Module) -> nn.Module:  # type: ignore[override]
        from winnow.numerics.modules import ConcatLinear

        if "fused" in layout:
            return ConcatLinear({half: cls.part_module(part, dense) for half, part in layout["fused"].items()})
        return cls.part_module(layout, dense)


def parts_of(group: list[Matrix]) -> list[Matrix]:
    """The group with a fused matrix as two matrices, gate and up, in modules below its module."""
    found = []
    for m in group:
        if m.role != FUSED:
            found.append(m)
            continue
        shape = (m.shape[0] // 2, m.shape[1])
        found += [replace(m, role=f"{half}_proj", module=f"{m.module}.{half}", shape=shape) for half in ("gate", "up")]
    return found


def parted(problem: Problem) -> Problem:
    """The problem of `parts_of` of its group: rows of weights, biases and output statistics are split between gate and up."""
    fused = next((m for m in problem.group if m.role == FUSED), None)
    if fused is None:
        return problem
    half, parts = fused.shape[0] // 2, parts_of(problem.group)
    weights, sites, biases, outputs = dict(problem.weights), dict(problem.sites), dict(problem.biases), dict(problem.outputs)
    rows = {f"{fused.layer:03d}.gate_proj": slice(None, half), f"{fused.layer:03d}.up_proj": slice(half, None)}
    for name, part in rows.items():
        weights[name] = weights[fused.name][part]
        if fused.name in sites:
            sites[name] = sites[fused.name]
        if fused.name in biases:
            biases[name] = biases[fused.name][part]
        if fused.name in outputs:
            both = outputs[fused.name]
            outputs[name] = {key: v[part] if v.dim() == 1 else v[part, part] for key, v in both.items()}
    return replace(problem, group=parts, weights=weights, sites=sites, biases=biases, outputs=outputs)
