"""What stages tell their jobs (`Stage.spec` in `winnow.planning.stages`), as types. Imported for annotations alone, so that an
edit repeats no job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NotRequired, TypedDict

from winnow.io.records import Row

Preset = dict[str, Any]  # a resolved preset: `kind`, if there are several, and its options


class Source(TypedDict):
    """Where a model comes from: `retrieve_model`, `retrieve_base`."""

    source: str
    revision: str | None


class Dequantize(TypedDict):
    """`dequantize`"""

    source: str  # a GGUF file, or a directory with one
    dtype: str | None  # of the stored tensors; None: that of the file


class Text(TypedDict):
    """`retrieve_text`, see `winnow.planning.config.Text`."""

    files: list[str]
    dataset: str | None
    subset: str | None
    split: str
    revision: str
    format: str
    column: str
    separator: str
    start: int
    stop: int | None


class Examples(TypedDict):
    """`retrieve_examples`, see `winnow.evaluation.kinds.classification`."""

    train: list[str]
    test: list[str]
    dataset: str | None
    subset: str | None
    revision: str
    train_split: str
    test_split: str
    columns: list[str]
    label: str
    labels: list[str] | None
    shared_rows: str


class Tasks(TypedDict):
    """`retrieve_tasks`, see `winnow.evaluation.kinds.accuracy`."""

    tasks: list[str]
    include_path: str | None
    files: dict[str, dict[str, list[str]]]
    num_fewshot: int | None
    limit: int | None


class Demo(TypedDict):
    """`demo_model`."""

    vocab_size: int
    shape: dict[str, Any]  # of config.json
    training: dict[str, Any]


class Windows(TypedDict):
    """`tokenize_rows`, and what `tokenize` needs of a calibration."""

    windows: int
    length: int
    seed: int


class CalibrationWindows(Windows):
    """`tokenize`, of a calibration."""

    kind: Literal["calibrations"]
    join: str
    special_tokens: bool


class EvaluationWindows(TypedDict):
    """`tokenize`, of an evaluation."""

    kind: Literal["evaluations"]
    join: str
    protocol: str
    length: int
    stride: int | None
    windows: int | None
    version: int


class Moments(TypedDict):
    """How second moments are summed."""

    precision: str
    first_token: bool


class GradientMoments(Moments):
    """The same, of gradients."""

    gradient_labels: str
    seed: int


class CollectStatistics(Moments):
    dtype: str


class CollectGradients(GradientMoments):
    dtype: str


class Structure(TypedDict):
    """What all need of a method."""

    structure: Preset
    structure_version: int


class Method(Structure):
    """A method as its factors depend on it."""

    metric: Preset | None
    metric_version: int | None


class PredictLosses(Method):
    fits_again: bool  # whether factors have neither tensors nor predicted losses


class Factorize(TypedDict):
    method: Method
    shard: str
    refitted: bool  # whether tensors are left out, see `factors` of a model


class Budget(TypedDict):
    """See `winnow.planning.config.Budget`."""

    targets: list[str]
    keep_bytes: Any  # a share, or None
    nearest: bool
    rank: Any  # a number, {target: number}, or None
    rank_fraction: Any  # likewise
    allocation: Preset


class TimeForms(Structure):
    timing: dict[str, Any]  # options of `winnow.allocation.times.Timing`, without the bound
    dtype: str  # of the model


class Allocation(TypedDict):
    """What a budget does not say of its allocation."""

    version: int
    libraries: dict[str, str]


class LearnSizes(Method):
    dtype: str
    budget: Budget
    allocation: Allocation


class PredictInRounds(Method, GradientMoments):
    dtype: str
    budget: Budget
    rounds: int
    allocation: Allocation


class Presets(TypedDict):
    """What a checkpoint is made by."""

    model: Preset
    calibration: Preset
    calibration_text: Preset  # where the words of the calibration come from
    method: Method
    budget: Budget


class Compress(TypedDict):
    names: dict[str, str]  # of the presets
    allocation: Allocation
    dtype: str
    presets: Presets


class Recover(TypedDict):
    name: str
    recovery: Preset
    length: NotRequired[int]  # of a task's rows
    version: int
    first_token: bool
    dtype: str


class Evaluate(TypedDict):
    """What is the same for all kinds of evaluations, besides `Evaluation.spec`."""

    name: str
    kind: str
    dtype: str
    recovery: NotRequired[Preset]


class Perplexity(Evaluate):
    protocol: str
    length: int
    stride: int | None
    compare: bool
    protocol_version: int
    rule: str


class Accuracy(Evaluate, Tasks):
    pass


class Classification(Evaluate):
    length: int
    limit: int | None


class Timing(TypedDict):
    batches: list[int]
    prompts: list[int]
    decode: int
    repeats: int
    warm_up: int


class Latency(Evaluate, Timing):
    engine: str
    python: str | None


class Compared(TypedDict):
    """Paths of two results."""

    compressed: str
    dense: str


class Card(TypedDict):
    checkpoint: str
    evaluations: dict[str, Compared]


class Cards(TypedDict):
    cards: dict[str, Card]


class Tables(TypedDict):
    rows: list[Row]


class Report(TypedDict):
    template: list[str]  # digests
    cells: int


class Tabulate(Tables):
    table: str  # `module:function`


class OwnNames(TypedDict):
    """What a study calls the presets of a cell."""

    method: str
    budget: str
    recovery: NotRequired[str]


class Trained(OwnNames):
    manifest: str  # of the cell's checkpoint


class MeasureStudy(TypedDict):
    study: str
    dtype: str
    options: NotRequired[dict[str, Any]]  # of the study, as far as they are not the defaults
    checkpoints: NotRequired[list[Trained]]


class ConcludeStudy(Tables):
    claims: list[dict[str, Any]]
    scores: list[Row]
    measured: dict[str, str]  # {model: path}
    template: list[str]


class StudyPage(TypedDict):
    """What the page of all papers says of a study that its folder does not hold."""

    title: str
    reference: str
    tables: Sequence[str]
    figures: Sequence[str]


class Studies(TypedDict):
    studies: dict[str, StudyPage]
    template: list[str]
