"""What several studies measure and tabulate, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from winnow.io.records import Row


class LossRow(TypedDict):
    """The loss of a cell, nats per token."""

    keep_bytes: float
    delta_nll: float  # above the dense model, paired by window
    delta_nll_se: float
    perplexity: float


class CellRow(Row, LossRow):
    """A row of the summary, as read from a data frame."""

    dense_bytes: int
    stored_bytes: int
    model_dense_bytes: int
    model_stored_bytes: int
    windows: int
    tokens: int
    nll: float
    nll_se: float
    kl: float
    top1_agreement: float
    checkpoint: str


class TimeRow(TypedDict):
    """The time of a form relative to the dense model's."""

    form: str
    phase: str
    batch: int
    prompt: int
    ratio: float
    ratio_low: float
    ratio_high: float
    control_q1: float
    control_q3: float
    verdict: str
    flops: float  # relative to dense
    weight_bytes: float
    device: str
    name: str  # of the machine
    threads: int


class Missing(TypedDict):
    """Of a model that a study cannot measure."""

    missing: str  # why


class Found(TypedDict):
    """What every study measures."""

    missing: NotRequired[str]  # instead of all else, see `Missing`
    identities: dict[str, float]  # residuals
