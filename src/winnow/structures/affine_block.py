"""`affine_block`: the whole FFN as one affine map of its input, of full or reduced rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.numerics.operations import Operations
from winnow.structures.base import Fit, Part, Problem, StructureOptions
from winnow.structures.ffn import FfnStructure

if TYPE_CHECKING:
    from torch import Tensor, nn


class AffineBlock(FfnStructure):
    """FFN(x) = A x + b by least squares on the calibration tokens, without the residual connection; at size k the best A of rank
    k (reduced-rank regression), and from k = d / 2 on the full A, which is then no larger."""

    reference = "R2_lin, arXiv 2606.19379; reduced-rank regression, Izenman 1975"
    stores = "left (d, k), right (k, d), b (d); or A (d, d), b (d)"
    formula = "min(2 k d, d^2) + d"
    objective = "ffn_output"
    keeps_activation = False
    predicts = True
    timed = True

    class Options(StructureOptions):
        kind: Literal["affine_block"]
        ridge: float = Field(1e-8, gt=0, le=1, description="relative ridge of the regression; raised if it is singular")

    options: Options

    def needs(self) -> tuple[str, ...]:
        return ("gram", "mean", "cross")

    def not_dense(self) -> str | None:
        return "affine_block removes the activation of the FFN"

    def limit(self, group: list[Matrix]) -> int:
        return (group[-1].shape[0] + 1) // 2

    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        d = group[-1].shape[0]
        return min(2 * size * d, d * d) + d

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """As in `Structure`; a map (d, d) and its factors are cached."""
        memory, operations, _ = super().work(group, needs)
        return memory, operations, 4.0 * group[-1].shape[0] * (group[-1].shape[0] + 2 * self.limit(group))

    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import leading_directions
        from winnow.numerics.neurons import affine_map

        *inner, down = problem.group
        x, weight = problem.sites[inner[-1].name], problem.weights[down.name]
        maps, constant, rest = affine_map(problem, self.options.ridge)
        whole = weight @ maps
        bias = weight @ constant + problem.biases.get(down.name, 0.0)
        found = leading_directions(whole, x["gram"] - torch.outer(x["mean"], x["mean"]), problem.precision, largest=largest)
        limit = self.limit(problem.group)
        floor = float(((weight @ rest) * weight).sum())
        error = floor + found.error[: largest + 1]
        error[limit:] = floor
        mean = bias + whole @ x["mean"]  # mean of the output, which is exact at every rank
        factors = {"left": found.left, "right": found.right}
        return Fit({"map": whole, "mean": mean, "input_mean": x["mean"], **factors}, error, found.spectrum)

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        """From the residual of the map at every rank: W_down h - y - A_k (x - m), with m and y + b the means of the fit."""
        import torch

        from winnow.numerics.linalg import residual_errors

        *inner, down = problem.group
        x, h = problem.sites[inner[-1].name], problem.sites[down.name]
        weight, found = problem.weights[down.name], {name: t.double() for name, t in tensors.items()}
        y, m = found["mean"] - problem.biases.get(down.name, 0.0), found["input_mean"]
        output, rows = weight @ h["mean"], problem.outputs[down.name]["gradient_gram"]
        target = weight @ h["gram"] @ weight.T - torch.outer(output, y) - torch.outer(y, output) + torch.outer(y, y)
        cross = weight @ h["cross"] - torch.outer(output, m) - torch.outer(y, x["mean"] - m)
        columns = x["gram"] - torch.outer(x["mean"], m) - torch.outer(m, x["mean"] - m)
        errors = residual_errors(target, cross, found["left"], found["right"], columns, rows)
        whole, limit = found["map"], self.limit(problem.group)
        full = (rows * (target - 2 * whole @ cross.T + whole @ columns @ whole.T)).sum().clamp(min=0)
        errors[limit:] = full
        return errors / 2

    def layouts_ffn(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        *gates, up, down = group
        layout = {"kind": self.kind(), "d": down.shape[0], "rank": None if size >= self.limit(group) else size}
        parts = {m.module: "gate" for m in gates} | {down.activation: "activation", up.module: "up", down.module: "down"}
        return {module: {**layout, "part": part} for module, part in parts.items()}

    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        *_, up, down = group
        if size >= self.limit(group):
            bias = tensors["mean"] - tensors["map"] @ tensors["input_mean"]
            own = {up.module: {"weight": tensors["map"]}, down.module: {"weight": bias.new_empty(0), "bias": bias}}
        else:
            left, right = tensors["left"][:, :size], tensors["right"][:size]
            bias = tensors["mean"] - left @ (right @ tensors["input_mean"])
            own = {up.module: {"weight": right}, down.module: {"weight": left, "bias": bias}}
        return {module: Part(layout, own.get(module, {})) for module, layout in self.layouts_ffn(group, size).items()}

    @staticmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import ConcatLinear, Constant

        d, width = layout["d"], layout["rank"] or layout["d"]
        if layout["part"] == "activation":
            return nn.Identity()
        if layout["part"] == "gate":
            return Constant(width, 1.0)
        if layout["part"] == "up":
            return nn.Linear(d, width, bias=False)
        return nn.Linear(width, d) if layout["rank"] else ConcatLinear({"all": nn.Identity()}, bias=d)
