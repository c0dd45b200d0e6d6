"""`shared_basis`: matrices of a layer with the same input share one basis: left_g (m_g, k) each, right (k, n) once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import Matrix
from winnow.structures.base import Fit, Part, Problem, Structure, StructureOptions

if TYPE_CHECKING:
    from torch import Tensor, nn


class SharedBasis(Structure):
    """The best rank-k map of the stacked matrix [W_1; W_2; ...]: GRC for {q, k, v} and gate/up PCA (in the metric `weights`).

    The stacked matrix M has M_k = U_k U_k^T M; left factors are the blocks of U_k, and U_k^T M is stored once. With `basis:
    inputs` the right factor spans the principal components of the inputs instead (needs the metric `gram`).
    """

    reference = "GRC, HyperTensor Paper I; SVD of the stacked matrix (T7)"
    stores = "right (k, n) once, left (m_g, k) per matrix"
    formula = "k (n + sum m_g)"
    bias_name = "left.bias"

    class Options(StructureOptions):
        kind: Literal["shared_basis"]
        basis: Literal["outputs", "inputs"] = Field(
            "outputs", description="outputs: the best rank-k map in the metric; inputs: principal components of the inputs"
        )

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        found: dict[tuple[int, str], list[Matrix]] = {}
        for m in matrices:
            found.setdefault((m.layer, m.site), []).append(m)
        return list(found.values())

    def numbers(self, group: list[Matrix], size: int, tensors: dict[str, Tensor]) -> int:
        return size * (group[0].shape[1] + sum(m.shape[0] for m in group))

    def fit(self, problem: Problem, largest: int) -> Fit:
        import torch

        from winnow.numerics.linalg import leading_directions, principal_components

        stacked = torch.cat([problem.weights[m.name] for m in problem.group])
        columns = problem.columns()
        if self.options.basis == "outputs":  # type: ignore[attr-defined]
            left, right, spectrum, error = leading_directions(stacked, columns, problem.precision, problem.rows(), largest)
        elif problem.rows() is None:
            right, spectrum, error = principal_components(stacked, columns)
            left = stacked @ right.T
        else:
            raise ValueError("principal components of the inputs need the metric `gram`, not one that weights outputs")
        return Fit({"left": left[:, :largest], "right": right[:largest]}, error[: largest + 1], spectrum)

    def stored(self, group: list[Matrix], tensors: dict[str, Tensor], size: int) -> dict[str, Part]:
        lefts = tensors["left"][:, :size].split([m.shape[0] for m in group])
        owner, found = group[0], {}
        for m, left in zip(group, lefts, strict=True):
            layout = {"kind": self.kind(), "out": m.shape[0], "in": m.shape[1], "rank": size}
            layout |= {} if m is owner else {"basis_of": owner.module}
            found[m.module] = Part(layout, {"weight": left.new_empty(0), "left.weight": left})
        found[owner.module].tensors["right.weight"] = tensors["right"][:size]
        return found

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import LowRankLinear, has_bias

        return LowRankLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense), shared=True)

    @staticmethod
    def share(model: nn.Module, name: str, layout: dict[str, Any]) -> dict[str, str]:
        from winnow.numerics.modules import SharedLinear

        if "basis_of" not in layout:
            return {}
        own, owner = model.get_submodule(name), layout["basis_of"]
        kept = model.get_submodule(f"{owner}.right")
        if kept.get_parameter("weight").shape != own.get_parameter("right.weight").shape:
            raise ValueError(f"its basis differs in shape from that of {owner}")
        own.right = kept
        if isinstance(kept, SharedLinear):
            kept.readers += 1
        own._tied_weights_keys = {"right.weight": f"{owner}.right.weight"}  # type: ignore[assignment]  # `save_pretrained` stores it once
        return {f"{name}.right.weight": f"{owner}.right.weight"}
