"""Linear recoverability."""

from winnow.studies.linearity.study import STUDY

__all__ = ["STUDY"]
