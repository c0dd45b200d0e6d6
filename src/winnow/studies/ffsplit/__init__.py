"""Heavy hitters and a split FFN."""

from winnow.studies.ffsplit.study import STUDY

__all__ = ["STUDY"]
