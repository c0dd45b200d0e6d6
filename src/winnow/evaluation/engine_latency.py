"""Times of a checkpoint in a serving engine, measured as `winnow.evaluation.latency` does: in turns with the dense model, which
is measured twice. Every repeat is one prompt and the tokens that follow."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from winnow.engines.speed import Process, prepared, processes
from winnow.evaluation.latency import bandwidth, clock_of, compared, interleaved, machine_record
from winnow.io.progress import every

if TYPE_CHECKING:
    from winnow.evaluation.results import Case, Resources, Times
    from winnow.io import specs


def engine_latency(dense: Path, checkpoint: Path | None, spec: specs.Latency, vocabulary: int, folder: Path) -> Times:
    """Prefill and decoding of the directories `dense` and `checkpoint` (None: only the dense one) in `spec["engine"]`, for every
    batch size and prompt length: {"cases": [...], "machine": {...}}. Exports are made in `folder` and removed.

    Raises InputError if the engine does not start or the checkpoint cannot be exported to it."""
    job: dict[str, Any] = {"context": max(spec["prompts"]) + spec["decode"] + 1, "batch": max(spec["batches"])}
    job |= {"threads": torch.get_num_threads(), "dtype": spec["dtype"]}
    cases: list[Case] = []
    with ExitStack() as stack:
        work = Path(stack.enter_context(TemporaryDirectory(dir=folder)))
        models = prepared(spec["engine"], dense, checkpoint, spec["dtype"], work)
        made = processes(stack, spec["engine"], str(spec["python"]), models, job, work)
        grid = [(batch, length) for batch in spec["batches"] for length in spec["prompts"]]
        for batch, length in every(grid, "batch sizes and prompts"):
            draw = torch.Generator().manual_seed(0)
            prompts = torch.randint(0, vocabulary, (batch, length), generator=draw).tolist()
            cases += _cases(made, {"prompts": prompts, "new": spec["decode"]}, spec, batch, length)
        version = made["dense"].version
    speed = bandwidth("cpu", clock_of("cpu"))
    return {"cases": cases, "machine": machine_record("cpu", "the engine's", speed, version)}


def _cases(made: dict[str, Process], request: dict[str, Any], spec: specs.Latency, batch: int, length: int) -> list[Case]:
    """Prefill and decoding of one batch size and prompt length."""
    held: dict[str, int] = {}

    def slot(name: str) -> dict[str, float]:
        found = made[name].ask(request)
        held[name] = found.pop("memory")
        return found

    for _ in range(spec["warm_up"]):
        for name in made:
            slot(name)
    slots = {"dense": "dense", "control": "dense", **({"compressed": "compressed"} if "compressed" in made else {})}
    seconds = interleaved({name: partial(slot, process) for name, process in slots.items()}, spec["repeats"])
    cases: list[Case] = []
    for phase, tokens in (("prefill", batch * length), ("decode", batch)):
        resources: dict[str, Resources] = {name: {"resident_bytes": held[name]} for name in made}
        found = compared({name: values[phase] for name, values in seconds.items()}, resources, tokens)
        case: Case = {"phase": phase, "batch": batch, "prompt": length, "dense": found["dense"], "control": found["control"]}
        if "compressed" in found:
            case["compressed"] = found["compressed"]
        cases.append(case)
    return cases
