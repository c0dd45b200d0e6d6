"""Compression in Python: `compress` and `evaluate`, by the functions of the workflow's stages, with everything in memory.

The workflow caches every intermediate, resumes after a kill, and compares methods on one evaluation; these functions are for one
model and one method at a time.
"""

from winnow.api.compression import Compressed, Report, compress
from winnow.api.evaluation import calibration_windows, evaluate, evaluation_windows

__all__ = ["Compressed", "Report", "calibration_windows", "compress", "evaluate", "evaluation_windows"]
