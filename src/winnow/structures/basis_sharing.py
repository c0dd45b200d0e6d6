"""`basis_sharing`: the same matrix of consecutive layers shares one basis; output and down projections are not shared."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from winnow.models.architectures import ROLES, Matrix
from winnow.structures.base import StructureOptions
from winnow.structures.shared_basis import SharedBasis

if TYPE_CHECKING:
    from torch import nn


class BasisSharing(SharedBasis):
    """Groups of `layers` layers share the right factor of [W_1; W_2; ...] in the metric sum_l C_l. Single layers, roles that are
    not shared, and experts of a mixture (which do not correspond between layers) are stored as `low_rank`."""

    reference = "Basis Sharing, arXiv 2410.03765"
    stores = "right (k, n) once per group of G layers, left (m, k) per layer"
    formula = "k (n + G m) per group"

    class Options(StructureOptions):
        kind: Literal["basis_sharing"]
        layers: int = Field(2, ge=1, description="consecutive layers that share a basis")
        roles: list[Literal[ROLES]] = Field(  # type: ignore[valid-type]
            ["q_proj", "k_proj", "v_proj", "qkv_proj", "gate_proj", "up_proj", "gate_up_proj"],
            description="roles that share a basis",
        )
        basis: Literal["outputs", "inputs"] = Field("outputs", description="as for shared_basis")

    def refits(self) -> bool:
        return True

    def groups(self, matrices: list[Matrix]) -> list[list[Matrix]]:
        options = self.options
        found: dict[tuple[int, str, int | None], list[Matrix]] = {}
        for m in matrices:
            shared = m.role in options.roles and m.expert is None  # type: ignore[attr-defined]
            first = m.layer - m.layer % options.layers if shared else m.layer  # type: ignore[attr-defined]
            found.setdefault((first, m.role, m.expert), []).append(m)
        return list(found.values())

    @staticmethod
    def module(layout: dict[str, Any], dense: nn.Module) -> nn.Module:
        from winnow.numerics.modules import LowRankLinear, has_bias

        return LowRankLinear(layout["in"], layout["out"], layout["rank"], has_bias(dense))  # each layer has its own input
