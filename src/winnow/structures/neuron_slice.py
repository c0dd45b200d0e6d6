"""`neuron_slice`: a smaller FFN of the same form; some neurons are kept, and down compensates for the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.numerics.operations import Operations
from winnow.structures.base import Fit, Part, Problem, StructureOptions
from winnow.structures.ffn import FfnStructure, statistics_of

if TYPE_CHECKING:
    from torch import Tensor, nn

BY_GAIN = 8  # measured time of its operations relative to those of a matrix product: it is bound by memory bandwidth


class NeuronSlice(FfnStructure):
    """The first k neurons S in order of importance; gate and up keep their rows, and down becomes W_down C_:S C_SS^{-1} with
    C = E[h h^T], the least-squares prediction of the output from the kept hidden units (Nystrom)."""

    reference = "MoDeGPT (MLP), arXiv 2408.09632"
    stores = "k rows of gate and up, down (d, k)"
    formula = "3 k d; 2 k d without gate"
    objective = "ffn_output"
    engines = ("torch", "vllm", "gguf")  # an FFN of the same form
    in_float64 = ("factor", "products")
    predicts = True
    timed = True

    class Options(StructureOptions):
        kind: Literal["neuron_slice"]
        criterion: Literal["leverage", "output", "loss", "activation", "activation_x_row", "weight_norm", "random"] = Field(
            "leverage",
            description="importance of a neuron: `output` and `loss` select neurons greedily by the reduction of the corrected "
            "output's error or of the predicted loss (needs a backward pass); for the others see winnow/numerics/neurons.py",
        )
        correction: Literal["nystrom", "none"] = Field("nystrom", description="whether down compensates for the dropped neurons")
        ridge: float = Field(1e-4, gt=0, le=1, description="ridge of the leverage scores, as a share of the mean second moment")
        seed: int = Field(0, ge=0, description="seed of the random criterion")

    options: Options

    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("gram", *statistics_of(self.options.criterion))))

    def count(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        (*inner, down), d = group, group[-1].shape[0]
        return len(group) * size * d + size * sum(m.bias for m in inner) + (d if down.bias else 0)

    def work(self, group: list[Matrix], needs: tuple[str, ...]) -> tuple[float, Operations, float]:
        """As in `Structure`, plus the greedy selection of neurons (`by_gain`). Cached are an order and, with a correction, a
        triangle (f, f) and down (d, f) times it, in float64."""
        memory, operations, cached = super().work(group, needs)
        d, f = group[-1].shape
        cached += 8.0 * f + (0.0 if self.options.correction == "none" else 8.0 * f * f + 4.0 * d * f)
        if self.options.criterion in ("output", "loss"):
            operations += Operations(products=BY_GAIN * (f**3 / 3 + 4 * d * f**2))
        return memory, operations, cached

    def fit_ffn(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import regularized
        from winnow.numerics.neurons import left_out, order_of, permuted

        down = problem.group[-1]
        order = order_of(problem, self.options.criterion, self.options.seed, self.options.ridge)
        tensors = {**permuted(problem, order), "order": order}
        weight = tensors[f"{down.role}.weight"]
        gram = problem.sites[down.name]["gram"][order][:, order]
        if self.options.correction == "none":
            error = left_out((weight.T @ weight) * gram)
            return Fit(tensors, error[: largest + 1], gram.diagonal().clamp(min=0).sqrt() * weight.norm(dim=0))
        # C = L L^T in this order gives the correction for every k: C_:S C_SS^{-1} = L_:S L_SS^{-1}.
        factor = torch.linalg.cholesky(regularized(gram, 1e-12, "the second moment of the hidden units"))
        products = weight @ factor
        gained = products.square().sum(0)
        error = torch.cat([gained.flip(0).cumsum(0).flip(0), gained.new_zeros(1)])
        kept = {name: t for name, t in tensors.items() if name != f"{down.role}.weight"}
        return Fit({**kept, "factor": factor, "products": products}, error[: largest + 1], gained.sqrt())

    def predicted(self, problem: Problem, tensors: dict[str, Tensor]) -> Tensor:
        """The change of the output is the contribution of the dropped neurons that the kept ones do not compensate: W_down
        without its first k columns times the hidden units, or, with C = L L^T, W_down L without them times L^{-1} h."""
        import torch

        from winnow.numerics.neurons import left_out

        down, order = problem.group[-1], tensors["order"]
        gram = problem.sites[down.name]["gram"][order][:, order]
        if self.options.correction == "none":
            columns = tensors[f"{down.role}.weight"].double()
        else:
            half = torch.linalg.solve_triangular(tensors["factor"], gram, upper=False)
            gram, columns = torch.linalg.solve_triangular(tensors["factor"], half.T, upper=False), tensors["products"]
        return left_out((columns.T @ problem.outputs[down.name]["gradient_gram"] @ columns) * gram) / 2

    def layouts_ffn(self, group: list[Matrix], size: int) -> dict[str, dict[str, Any]]:
        d, sides = group[-1].shape[0], {}
        for m in group:
            sides[m.module] = {"out": d, "in": size} if m is group[-1] else {"out": size, "in": m.shape[1]}
        return {module: {"kind": self.kind(), **own} for module, own in sides.items()}

    def weights(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
        """{role: matrix of the first `size` neurons}"""
        import torch

        *inner, down = group
        found = {m.role: tensors[f"{m.role}.weight"][:size] for m in inner}
        if self.options.correction == "none":
            return found | {down.role: tensors[f"{down.role}.weight"][:, :size]}
        factor, products = tensors["factor"][:size, :size], tensors["products"][:, :size]
        return found | {down.role: torch.linalg.solve_triangular(factor.T, products.T, upper=True).T}

    def store_ffn(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        weights, found, layouts = self.weights(group, tensors, size), {}, self.layouts_ffn(group, size)
        for m in group:
            own = {"weight": weights[m.role]}
            if m.bias:
                own["bias"] = tensors[f"{m.role}.bias"][: None if m is group[-1] else size]
            found[m.module] = Part(layouts[m.module], own)
        return found

    @staticmethod
    def part_module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from torch import nn

        from winnow.numerics.modules import has_bias

        return nn.Linear(layout["in"], layout["out"], has_bias(dense))
