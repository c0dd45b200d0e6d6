"""What the study measures, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from winnow.studies.records import Found

Key = Literal["scalar", "feature"]  # of definitions of R^2


class Scores(TypedDict):
    """R^2 by every definition, see `winnow.studies.linearity.recoverability.r2_scores`."""

    scalar: float
    feature: float
    median: NotRequired[float]


class OfTokens(Scores):
    tokens: int


class BlockScores(Scores):
    """An affine map of a block: held-out R^2, and the ranks that reach a share of it."""

    layer: int
    scalar_mean: float
    scalar_fold_se: float
    no_first_token: float
    rank_90: int
    rank_95: int
    times_smaller: float
    folds: list[float]
    tokens: list[OfTokens]
    ranks: list[tuple[int, float]]  # (rank, R^2)


class TrainedMap(TypedDict):
    inputs: str
    step: int
    r2: float


class Probe(TypedDict):
    layer: int
    trained: list[TrainedMap]
    bilinear_gain: float


class Swap(TypedDict):
    """The loss above dense with an affine map in a block's place."""

    layer: int
    rank: NotRequired[int]
    healed: str
    delta_nll: float
    delta_nll_se: float


class Untrained(Scores):
    weights: str
    seed: int
    layer: int


class Linear(Found):
    blocks: list[BlockScores]
    probes: dict[str, Probe]
    swaps: list[Swap]
    healed: dict[str, list[Swap]]
    learned: list[Untrained]
