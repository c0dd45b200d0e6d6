"""What the study measures, as types. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import TypedDict

from winnow.studies.records import Found, TimeRow


class EffectiveRanks(TypedDict):
    """Of a matrix in a metric, as shares of its smaller side, `ambient`."""

    layer: int
    role: str
    metric: str
    ambient: int
    k95: float
    stable: float
    entropy: float
    rrr90: float


class Parts(TypedDict):
    """Means over the early, middle and late layers."""

    early: float
    middle: float
    late: float
    excess: float  # of the lower end above the middle, %
    chance: float  # share of orders of the layers with at least this excess


class Hourglass(Parts):
    role: str
    metric: str
    definition: str


class Removed(TypedDict):
    """Removed parameters by a convention, the last two in %."""

    convention: str
    counted: bool  # whether it counts everything stored
    removed_numbers: int
    of_all: float
    of_blocks: float


class Grc(TypedDict):
    """Effective ranks are shares of the width, and None without such matrices; the others are in %."""

    k95_qkv: float | None
    k95_gate_up: float | None
    sinks: float
    full: float


class Bypassed(Found):
    layers: int
    ffn_share: float
    ranks: list[EffectiveRanks]
    hourglass: list[Hourglass]
    accounting: dict[str, list[Removed]]
    stored_bytes: dict[str, int | None]
    grc: Grc
    latency: list[TimeRow]
