"""How fast machines do what jobs do: of this one, measured, and of devices that a plan is made for elsewhere."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields
from typing import Any

from winnow.errors import InputError
from winnow.numerics.operations import CALL, EIGEN, Operations

START = 5.0  # seconds until a process computes


@dataclass(frozen=True)
class Rates:
    """Operations a second by kind, as `winnow.numerics.operations.Operations` counts them, and bytes of files written a second,
    with reading, checking and cutting what they are made of."""

    half: float
    products: float
    decompositions: float
    calls: float
    written: float
    memory: float = 0.0  # bytes of a device; 0: unknown

    def seconds(self, operations: Operations) -> float:
        return sum(number / getattr(self, kind) for kind, number in asdict(operations).items())


def alike(rate: float) -> Rates:
    """One rate for all operations, as on a CPU; bytes a second are those of `compress` on two cores."""
    return Rates(rate, rate, rate, rate, 0.15e9)


# H200: products of 16 bits as in `collect_statistics`, eigenproblems of 4,096 in 0.11 s, and bytes as in a layer read and written
# in `collect_statistics` with `load: stream`: measured (docs/how-to/large-models.md). Assumed: other products at half of 4.5e13,
# as half of a square product's rate on a CPU; calls of 10 microseconds.
DEVICES = {"h200": Rates(4.6e14, 2.25e13, EIGEN * 4096**3 / 0.11, CALL / 1e-5, 0.57e9, 140e9)}


def rates_of(device: Any) -> Rates:
    """The rates of `--config device=...`: the name of one of DEVICES, or a mapping of them with all keys of `Rates` but `memory`.
    Raises InputError for anything else."""
    if isinstance(device, str) and device in DEVICES:
        return DEVICES[device]
    known = {field.name for field in fields(Rates)}
    if not isinstance(device, dict) or set(device) - known or known - {"memory"} - set(device):
        names = ", ".join(DEVICES)
        raise InputError(f"--config device: {device!r} is no device with known rates ({names}); or give rates: {_example()}")
    try:
        found = {key: float(value) for key, value in device.items()}
    except (TypeError, ValueError):
        found = {}
    if not all(0 < value < float("inf") for value in found.values()) or not found:
        raise InputError(f"--config device: rates must be positive numbers, such as {_example()}")
    return Rates(**found)


def _example() -> str:
    return "{" + ", ".join(f"{key}: {value:.2g}" for key, value in asdict(DEVICES["h200"]).items()) + "}"


def of_this_machine() -> Rates:
    """From a tenth of a second of float32 products; halved, since no stage is products only."""
    import numpy as np

    one = np.ones((512, 512), dtype=np.float32)
    one @ one
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < 0.1:
        one @ one
        count += 1
    return alike(0.5 * count * 2 * 512**3 / (time.perf_counter() - began))
