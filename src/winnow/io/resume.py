"""Saved states of long jobs, so that an interrupted job can be resumed with bit-identical results.

The state is stored beside the artefact in a hidden file with the provenance of the job, and is used only by a job of the same
provenance. It is removed when the artefact is finished.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from winnow.errors import InputError
from winnow.io.artifacts import MANIFEST, read_tensors, write_tensors
from winnow.io.records import Provenance

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)
SECONDS = "WINNOW_SAVE_SECONDS"  # seconds between two saves; it changes no result, so it is not a parameter of a job
SHARE = 20  # after a save that took s seconds, none for 20 s seconds


class Resume:
    """Saved state of one artefact: tensors by name."""

    def __init__(self, artefact: Path | str, provenance: Provenance):
        artefact = Path(artefact)
        self.path = artefact.with_name(f".{artefact.name}.state")
        self.provenance = json.loads(json.dumps(provenance))  # as it comes back from a file
        self.pause = float(os.environ.get(SECONDS, "30"))
        self.next = time.monotonic() + self.pause

    def load(self) -> dict[str, Tensor]:
        """The state saved by a job of the same provenance; empty if there is none. A damaged one is logged and ignored."""
        return _saved(self.path, self.provenance)

    def restore(self, sums: dict[str, Tensor]) -> int:
        """Copy a saved state into `sums`, in place; returns the number of windows in them."""
        state = self.load()
        if not state:
            return 0
        if any(name not in state or state[name].shape != tensor.shape for name, tensor in sums.items()):
            log.info("starting over: %s is of a job that ran the model in another way", self.path)
            return 0
        for name, tensor in sums.items():
            tensor.copy_(state[name])
        log.info("resuming after window %d of %s", int(state["done"]), self.path)
        return int(state["done"])

    def save(self, done: int, sums: dict[str, Tensor]) -> None:
        """Save `sums` of `done` windows, if the last save is long enough ago."""
        if time.monotonic() < self.next:
            return
        import torch

        began = time.monotonic()
        state = {name: tensor.cpu() for name, tensor in sums.items()}
        write_tensors(self.path, state | {"done": torch.tensor(done)}, {"provenance": self.provenance}, sealed=True)
        ended = time.monotonic()
        self.next = ended + max(self.pause, SHARE * (ended - began))

    def keep(self, part: str, tensors: dict[str, Tensor]) -> None:
        """Save the tensors of a finished part of the artefact, in a file of its own."""
        found = {name: tensor.cpu() for name, tensor in tensors.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(self._of(part), found, {"provenance": self.provenance}, sealed=True)

    def kept(self, part: str) -> dict[str, Tensor]:
        """The tensors of a part that a job of the same provenance finished; empty if there are none."""
        return _saved(self._of(part), self.provenance)

    def _of(self, part: str) -> Path:
        return self.path.with_name(f"{self.path.name}-{part}")

    def clear(self) -> None:
        for path in (self.path, *self.path.parent.glob(f"{self.path.name}-*")):
            path.unlink(missing_ok=True)


def _saved(path: Path, provenance: Provenance) -> dict[str, Tensor]:
    """The tensors of a state that a job of the same provenance saved; empty if there is none. A damaged one is logged."""
    if not path.is_file():
        return {}
    try:
        state, metadata = read_tensors(path, sealed=True)
    except InputError as error:
        log.info("starting over: %s", error)
        return {}
    if metadata["provenance"] != provenance:
        log.info("starting over: %s was saved with other parameters, code or inputs", path)
        return {}
    return state


def own_files(folder: Path, provenance: Provenance) -> set[str]:
    """Names of the safetensors files that a job of the same provenance wrote of an unfinished bundle; all others are removed.

    Files are complete, since they are renamed into place. A finished bundle is computed again: its job was asked to rerun.
    """
    kept: set[str] = set()
    finished = (folder / MANIFEST).is_file()
    for path in sorted(folder.glob("*.safetensors")):
        if not finished and _provenance(path) == json.loads(json.dumps(provenance)):
            kept.add(path.name)
        else:
            path.unlink()
    if kept:
        log.info("resuming: %d files of %s exist already", len(kept), folder)
    return kept


def _provenance(path: Path) -> Provenance | None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as stream:
            return json.loads((stream.metadata() or {}).get("winnow", "null"))
    except SafetensorError:
        return None


class Pieces:
    """Finished pieces of a long measurement, JSON values by name, so that an interrupted job goes on after the last one.

    Each is a line of a hidden file beside the artefact, after its digest; the first line is the provenance of the job, and a job
    of another one starts over.
    """

    def __init__(self, artefact: Path | str | None = None, provenance: Provenance | None = None):
        """`artefact`: what the pieces are part of; without it, none is kept."""
        self.path = None if artefact is None else Path(artefact).with_name(f".{Path(artefact).name}.state")
        self.found: dict[str, Any] = {}
        if self.path is None:
            return
        first, *lines = list(self._lines()) or [None]
        if first == json.loads(json.dumps(provenance)):
            self.found = dict(lines)
            log.info("resuming: %d pieces of %s exist already", len(self.found), Path(str(artefact)).name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "w", encoding="utf-8") as stream:  # without a line that was cut
            stream.writelines(map(_line, [provenance, *self.found.items()]))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """The piece of this name, made unless it was by an earlier job: builtin types, as they come back from a file."""
        if name not in self.found:
            line = _line([name, make()])
            if self.path is not None:
                with open(self.path, "a", encoding="utf-8") as stream:
                    stream.write(line)
                    stream.flush()
                    os.fsync(stream.fileno())
            self.found[name] = json.loads(line.partition(" ")[2])[1]
        return self.found[name]

    def clear(self) -> None:
        """Forget all pieces: the artefact is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _lines(self) -> Iterator[Any]:
        """The whole lines of the file; none from the first damaged one on."""
        assert self.path is not None
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            digest, _, text = line.partition(" ")
            if hashlib.sha256(text.encode()).hexdigest() != digest:
                return
            yield json.loads(text)


def _line(content: Any) -> str:
    text = json.dumps(content)
    return f"{hashlib.sha256(text.encode()).hexdigest()} {text}\n"
