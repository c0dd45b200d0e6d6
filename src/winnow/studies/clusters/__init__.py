"""Per-cluster column SVD, activation weighting, LoRA."""

from winnow.studies.clusters.study import STUDY

__all__ = ["STUDY"]
