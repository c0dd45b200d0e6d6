"""What the study measures, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from winnow.studies.records import Found


class Gains(TypedDict):
    """Means over matrices of what clusters gain over one SVD, in %; None where that SVD is exact."""

    by: str
    clusters: int
    k: float
    matrices: int
    stored: float | None
    equal_rank: float | None
    equal_rank_se: float | None
    equal_bytes: float | None
    equal_bytes_se: float | None
    gauge_fixed: float | None
    gauge_fixed_se: float | None
    over_random: float | None
    over_random_se: float | None


class Comparison(TypedDict):
    """The comparison of the paper's script."""

    matrices: str
    clusters: int
    k: float
    gain: float
    rank_ratio: float
    stored: float


class Outlying(TypedDict):
    """Of the scores of a matrix's columns."""

    massive: float
    top_share: float
    largest: float


class Massive(Outlying):
    layer: int
    score: str
    columns: int
    left_out: float  # correlation with the loss without a column


class MatrixErrors(TypedDict):
    weights: float
    activations: float


class OutputErrors(TypedDict):
    blocks: float
    logits: float


class CellErrors(MatrixErrors, OutputErrors):
    """Error measures of a checkpoint."""

    method: str
    budget: str


class CellErrorsAndLoss(CellErrors):
    model: str
    delta_nll: float
    delta_nll_se: float


class Correlation(TypedDict):
    """Of an error measure with the loss."""

    budget: NotRequired[str]
    measure: str
    cells: int
    spearman: float
    spearman_se: float


class Clustered(Found):
    reconstruction: list[Gains]
    published: list[Comparison]
    flatness: float
    errors: list[CellErrors]
    massive: list[Massive]
    training: dict[str, dict[str, Any]]  # recovery.json by method
