"""Cross-layer subspace coupling."""

from winnow.studies.coupling.study import STUDY

__all__ = ["STUDY"]
