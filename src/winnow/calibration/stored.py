"""Statistics of a layer as the tensors of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from winnow.io.symmetric import halved

if TYPE_CHECKING:
    from torch import Tensor

SYMMETRIC = ("gram", "gradient_gram")


def stored(found: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """{"site.statistic": tensor} from {site (or role): {statistic: tensor}}, symmetric matrices by half."""
    return halved({f"{place}.{name}": value for place, values in found.items() for name, value in values.items()}, SYMMETRIC)
