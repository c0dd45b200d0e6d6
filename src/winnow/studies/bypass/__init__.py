"""FFN SVD/PCA with residual bypass on top of GRC attention."""

from winnow.studies.bypass.study import STUDY

__all__ = ["STUDY"]
