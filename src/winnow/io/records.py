"""What stages hand to each other in JSON, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class Params(TypedDict):
    """What a job is planned with, besides its input files."""

    spec: Mapping[str, Any]  # what its stage tells it, see `winnow.io.specs`
    code: list[str]  # `module digest`
    versions: dict[str, str]  # of libraries
    files: dict[str, str]  # {file of the user: SHA-256}


class Provenance(TypedDict):
    """What an artefact was made by and from."""

    rule: str
    wildcards: dict[str, str]
    params: Params
    inputs: dict[str, str]  # {input: SHA-256}
    file: NotRequired[str]  # the name of the artefact, of those that are one file


class Shaped(TypedDict):
    shape: list[int]


class TensorRecord(Shaped):
    """Where a tensor of a model is stored."""

    file: str
    key: str
    dtype: str


class BaseManifest(TypedDict):
    """A directory of Hugging Face files."""

    directory: str
    files: dict[str, str]  # {name: SHA-256}


class Dequantized(TypedDict):
    """The GGUF file that a directory of safetensors was made from."""

    file: str
    sha256: str
    type: str  # of the file, such as Q4_K_M
    types: dict[str, int]  # {type: tensors}
    dtype: str  # of the tensors once dequantised


_Class = TypedDict("_Class", {"class": str})  # the name of a model's transformers class


class ModelManifest(BaseManifest, _Class):
    """A model as it is compressed."""

    model_type: str
    causal: bool
    max_length: int | None  # positions; None: no limit
    tied: dict[str, str]  # {tensor: the one that it is tied to}
    tensors: dict[str, TensorRecord]  # by canonical name
    bytes: int
    dequantized: NotRequired[Dequantized]  # of a model from a GGUF file


class Sealed(TypedDict):
    """What is added when a manifest or a result is written."""

    provenance: NotRequired[Provenance]


class StatisticsManifest(Sealed):
    """Second moments of a calibration."""

    tokens: int
    few_tokens: list[str]  # warnings


class FactorsManifest(Sealed):
    """Fits of a shard."""

    groups: list[str]
    left_dense: dict[str, int]  # {group of experts: calibration tokens, which are too few}


class Overlap(Sealed):
    """What a calibration text and evaluation data have in common, as shares of runs of words."""

    words_per_run: int
    common_runs: int
    of_calibration: float
    of_evaluation: float
    allowed: float


class ExamplesFacts(TypedDict):
    """The rows of a classification task."""

    labels: list[str]  # names of the classes
    rows: dict[str, int]  # by split
    dropped: int  # train rows that are also test rows
    digests: dict[str, str]


class Sizes(TypedDict):
    """Bytes of the compressed matrices, dense and as stored, and of the whole model as stored."""

    dense_bytes: int
    stored_bytes: int
    model_stored_bytes: int


class TimedMatrix(TypedDict):
    """What the time of a dense matrix depends on."""

    outputs: int
    inputs: int
    bias: bool


class DenseTime(TimedMatrix):
    """The product with a dense matrix."""

    matrices: int  # of this shape in the model
    seconds: Mapping[str, float]  # median, q1, q3
    control: Mapping[str, float]  # measured a second time, over the first: median, q1, q3, low, high


class FormTime(TypedDict):
    """The products with the form of a group of matrices."""

    structure: str  # its kind
    matrices: list[TimedMatrix]
    size: int
    seconds: Mapping[str, float]  # median, q1, q3
    ratio: Mapping[str, float]  # seconds over those of the dense matrices in the same repeat: median, q1, q3, low, high
    control: Mapping[str, float]  # the dense matrices measured a second time, over the first


class TimesRecord(Sealed):
    """Measured times of the forms of a model's matrices (rule `time_forms`)."""

    protocol: Mapping[str, Any]
    dense: list[DenseTime]
    forms: list[FormTime]
    machine: Mapping[str, Any]


class GroupRecord(TypedDict):
    """A group of matrices in allocation.json."""

    group: str
    size: int | None  # None: it stays dense
    dense_bytes: int
    stored_bytes: int
    relative_error: float  # the lost share of the objective
    predicted: NotRequired[float]  # nats per token


class AllocationRecord(TypedDict):
    """The sizes of all groups in allocation.json."""

    dense_bytes: int
    stored_bytes: int
    keep_bytes: float
    predicted: NotRequired[float]
    groups: list[GroupRecord]
    left_dense: NotRequired[dict[str, int]]  # {group of experts: its calibration tokens, which are too few}


class LearnedRecord(TypedDict):
    """What allocation.json says of learned.json: held-out losses, nats per token."""

    held_out_start: float
    held_out_best: float
    best_step: int


class RoundRecord(TypedDict):
    """One of the rounds in which losses are predicted."""

    round: int
    calibration_nll: float
    predicted: float
    left_dense: int
    chosen: NotRequired[bool]


class SpectrumRow(TypedDict):
    """A row of spectra.parquet, besides effective ranks."""

    group: str
    layer: int  # the first
    role: str
    metric: str
    singular_values: list[float]
    error: list[float]  # at every size
    numbers: list[int]  # likewise


class Row(TypedDict):
    """The names of a cell in tables, before anything is measured."""

    model: str
    calibration: str
    seeds_of: str
    seed: int | None
    method: str
    structure: str
    metric: str
    budget: str
    allocation: str
    recovery: str
    evaluation: str
    targets: str
    keep_requested: float | None
    result: str  # the path of what was measured


def sizes_of(manifest: Mapping[str, Any]) -> Sizes:
    """The sizes in the manifest of a checkpoint."""
    return {key: manifest[key] for key in Sizes.__annotations__}  # type: ignore[return-value]
