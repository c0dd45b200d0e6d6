"""What the study measures, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import TypedDict

from winnow.studies.records import Found, Missing, TimeRow


class Delta(TypedDict):
    """Nats per token above dense."""

    delta_nll: float
    delta_nll_se: float


class Concentration(TypedDict):
    """Of the scores of a layer's neurons by a criterion, see `winnow.studies.ffsplit.heavy.concentration`."""

    layer: int
    criterion: str
    neurons: int
    held: float
    held_elsewhere: float
    same: float
    per_token: float
    per_token_best: float
    curve: list[list[float]]


class ZeroedRow(Delta):
    zeroed: str


class Zeroed(TypedDict):
    rows: list[ZeroedRow]
    above: dict[str, tuple[float, float]]  # (nats, standard error)


class SweepRow(Delta):
    sweep: str
    heavy: float
    light_rank: float
    criterion: str
    metric: str
    keep_bytes: float


class Size(TypedDict):
    """Parameter counts; savings and the FFNs' share of each count are in %."""

    whole: int
    without_embeddings: int
    blocks: int
    ffn: int
    ffn_stored: int
    ffn_kept: float
    saved: dict[str, float]
    ffn_share: dict[str, float]


class Quantised(TypedDict):
    """A split beside rounding of all neurons, nats per token."""

    scale: str
    heavy_bits: int
    light_bits: int
    all_bits: int
    more: str
    split_per_number: float
    all_per_number: float
    split_nll: float
    split_nll_se: float
    all_nll: float
    all_nll_se: float
    above: float
    above_se: float


class Unsplit(Missing):
    sizes: dict[str, Size]


class Split(Found):
    concentration: list[Concentration]
    zeroed: Zeroed
    sweeps: list[SweepRow]
    quarter: tuple[float, float]  # (nats, standard error)
    sizes: dict[str, Size]
    latency: list[TimeRow]
    quantised: list[Quantised]
