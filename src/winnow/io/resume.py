"""What a long stage had reached when its process ended, so that the next one goes on from there with the same bytes.

The state lies beside the artefact under a name with a dot, holds the provenance of the job, and is used only by a job of the
same provenance. It is removed when the artefact is finished.
"""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
SECONDS = "WINNOW_SAVE_SECONDS"  # between two saves; how a job runs, so it is no parameter of any
SHARE = 20  # a save that took s seconds is followed by 20 s seconds without one


class Resume:
    """Saved state of one artefact: named tensors, whatever they mean to the stage."""

    def __init__(self, artefact: Path | str, provenance: dict[str, Any]):
        artefact = Path(artefact)
        self.path = artefact.with_name(f".{artefact.name}.state")
        self.provenance = json.loads(json.dumps(provenance))  # as it comes back from a file
        self.pause = float(os.environ.get(SECONDS, "30"))
        self.next = time.monotonic() + self.pause

    def load(self) -> dict[str, Tensor]:
        """The state that a job of the same provenance left; empty if there is none. A damaged one is logged and not used."""
        if not self.path.is_file():
            return {}
        try:
            state, metadata = read_tensors(self.path, sealed=True)
        except InputError as error:
            log.info("starting over: %s", error)
            return {}
        if metadata["provenance"] != self.provenance:
            log.info("starting over: %s is of other parameters, code or inputs", self.path)
            return {}
        return state

    def restore(self, sums: dict[str, Tensor]) -> int:
        """Copy a saved state into `sums`, in place; returns how many windows are in them."""
        state = self.load()
        if not state:
            return 0
        for name, tensor in sums.items():
            tensor.copy_(state[name])
        log.info("going on after window %d of %s", int(state["done"]), self.path)
        return int(state["done"])

    def save(self, done: int, sums: dict[str, Tensor]) -> None:
        """Keep `sums`, which hold `done` windows, if the last save is long enough ago."""
        if time.monotonic() < self.next:
            return
        import torch

        began = time.monotonic()
        state = {name: tensor.cpu() for name, tensor in sums.items()}
        write_tensors(self.path, state | {"done": torch.tensor(done)}, {"provenance": self.provenance}, sealed=True)
        ended = time.monotonic()
        self.next = ended + max(self.pause, SHARE * (ended - began))

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def own_files(folder: Path, provenance: dict[str, Any]) -> set[str]:
    """Names of the safetensors files of an unfinished bundle that a job of the same provenance wrote; all others are removed.

    A file there is whole, since it was renamed into its place. A finished bundle is made anew: its job was asked to run again.
    """
    kept: set[str] = set()
    finished = (folder / MANIFEST).is_file()
    for path in sorted(folder.glob("*.safetensors")):
        if not finished and _provenance(path) == json.loads(json.dumps(provenance)):
            kept.add(path.name)
        else:
            path.unlink()
    if kept:
        log.info("going on: %d files of %s are there already", len(kept), folder)
    return kept


def _provenance(path: Path) -> dict[str, Any] | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stream:
            return json.loads((stream.metadata() or {}).get("winnow", "null"))
    except SafetensorError:
        return None
