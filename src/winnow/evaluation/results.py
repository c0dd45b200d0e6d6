"""What evaluations measure, as types of their JSON. Imported for annotations alone, so that an edit repeats no measurement."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from winnow.io.records import Sizes


class Measured(Sizes):
    """What every result says of the measured model."""

    model_dense_bytes: int
    checkpoint: str  # its directory


class PerWindow(TypedDict):
    """Sums over the scored tokens of every window."""

    nll: list[float]
    tokens: list[float]
    kl: NotRequired[list[float]]  # of the dense model from this one
    agree: NotRequired[list[float]]  # tokens with the same top-1 prediction


class Summary(TypedDict):
    """Means over tokens of the sums per window, nats, and their standard errors."""

    windows: int
    tokens: int
    nll_sum: float
    nll: float
    nll_se: float
    perplexity: float
    kl: NotRequired[float]
    kl_se: NotRequired[float]
    top1_agreement: NotRequired[float]
    top1_agreement_se: NotRequired[float]
    delta_nll: NotRequired[float]  # above the dense model, paired by window
    delta_nll_se: NotRequired[float]


class Protocol(TypedDict):
    protocol: str
    protocol_version: int
    rule: str
    length: int
    stride: int | None
    dtype: str


class ScoredText(TypedDict):
    text_digest: str
    text_tokens: int
    bos: bool


class Losses(Summary):
    """Of `perplexity`."""

    protocol: Protocol
    text: ScoredText
    per_window: PerWindow


class LossResult(Losses, Measured):
    pass


class AgainstControl(TypedDict, total=False):
    """The difference to the dense model after the same recovery."""

    delta_control: float
    delta_control_se: float | None


class Score(AgainstControl):
    """A measure of a task; differences are paired by document or row, and errors None if there are none."""

    value: float
    value_se: float | None
    delta: NotRequired[float]  # to the dense model
    delta_se: NotRequired[float | None]
    per_document: NotRequired[list[float]]


Scores = dict[str, Score]  # by measure


class TaskScores(TypedDict):
    """Of `accuracy`."""

    protocol: dict[str, Any]
    tasks: dict[str, dict[str, Any]]  # what identifies its documents, and how many they are
    scores: dict[str, Scores]


class PerRow(TypedDict):
    predicted: list[int]
    loss: list[float]


class LabelledRows(PerRow):
    label: list[int]


class ClassScores(TaskScores):
    """Of `classification`."""

    correct: int
    count: int
    per_row: LabelledRows


class ScoreResult(TaskScores, Measured):
    pass


class ClassResult(ClassScores, Measured):
    pass


class Quartiles(TypedDict):
    median: float
    q1: float
    q3: float


class Ratio(Quartiles):
    """Of times, with the interval of the median."""

    low: float
    high: float


class Resources(TypedDict, total=False):
    """What a phase of a model takes; `flops` and `weight_bytes` are per token, and `floor_seconds` is the time in which the bytes
    of the weights of all its tokens are read."""

    resident_bytes: int
    peak_bytes: int
    flops: float
    weight_bytes: float
    floor_seconds: float


class Timed(Resources):
    """A model in one case; the dense model is not compared with itself, and of the control only times are of interest."""

    seconds: Quartiles
    tokens_per_second: float
    ratio: NotRequired[Ratio]
    verdict: NotRequired[str]
    per_repeat: NotRequired[list[float]]


class Case(TypedDict):
    """A phase at a batch size and a prompt length."""

    phase: str
    batch: int
    prompt: int
    dense: Timed
    control: Timed
    compressed: NotRequired[Timed]


class Machine(TypedDict):
    device: str
    name: str
    clock: str
    peak_memory: str
    threads: int
    processors: int | None
    load: float | None
    bandwidth: float  # bytes per second
    torch: str
    engine: str  # with its version, if it is not transformers
    attention: str


class Times(TypedDict):
    cases: list[Case]
    machine: Machine


class TimeResult(Times, Measured):
    """Of `latency`."""

    protocol: dict[str, Any]
