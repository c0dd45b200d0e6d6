"""What stages hand to each other in JSON, as types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict


class Params(TypedDict):
    """What a job is planned with, besides its input files."""

    spec: dict[str, Any]  # the parameters of its stage, see `winnow.planning.stages`
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


class TensorRecord(TypedDict):
    """Where a tensor of a model is stored."""

    file: str
    key: str
    dtype: str
    shape: list[int]


class Sizes(TypedDict):
    """Bytes of the compressed matrices, dense and as stored, and of the whole model as stored."""

    dense_bytes: int
    stored_bytes: int
    model_stored_bytes: int


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
