"""Files that no rule of the workflow makes: models, texts, rows and tasks of the user. Their content decides, not their time.

A digest is remembered with what `stat` said of the file, and taken again only where any of that differs: a file put in another's
place with `mv`, `cp -p`, `rsync -a` or `tar -x` can be older than what was made from the one before it.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from winnow.errors import InputError
from winnow.io.artifacts import file_digest, read_json, write_note

if TYPE_CHECKING:
    from winnow.planning.labels import Labels

    pass

MEMORY = Path(".snakemake/winnow-files")  # in the folder of a run
SETTLED = 2.0  # seconds; a file that changed later than that may change again without its times showing it
LARGE = 1 << 30  # bytes that are not read at a plan without a word


class Digests:
    """SHA-256 of files, remembered in a folder, one small file each."""

    def __init__(self, memory: Path = MEMORY):
        self.memory = memory

    def of(self, path: Path | str) -> str:
        """The digest of a file's content now. Raises InputError if it cannot be read."""
        path = Path(path)
        try:
            stat, seen = path.stat(), _seen(path)
            entry = self.memory / f"{sha256(os.fsencode(os.path.abspath(path))).hexdigest()}.json"
            if (known := _read(entry)) and known["seen"] == seen:
                return known["sha256"]
            if stat.st_size > LARGE:
                print(f"winnow: reading {path} ({stat.st_size / 1e9:.1f} GB), whose content is not known yet", file=sys.stderr)
            digest = file_digest(path)
            if _seen(path) != seen:
                raise InputError(f"{path}: was written to while it was read; try again when it is complete")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from error
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED:
            write_note(entry, json.dumps({"path": str(path), "seen": seen, "sha256": digest}))
        return digest


class Outside:
    """The files of the user that stages read, with their digests, each taken once."""

    def __init__(self, presets: Labels):
        self.presets = presets
        self.digests = Digests()

    @cache  # noqa: B019 - one lives as long as the process, in which all jobs see the same content
    def of(self, *paths: str) -> dict[str, str]:
        """{file: SHA-256 of its content now}"""
        return {path: self.digests.of(path) for path in paths}

    @cache  # noqa: B019
    def task(self, evaluation: str) -> dict[str, str]:
        """The files that the tasks of an accuracy preset (by label) read."""
        return self.of(*self.presets.task_files(evaluation))

    @cache  # noqa: B019
    def model(self, label: str, manifest: str) -> dict[str, str]:
        """The files of a model (by label) as it was retrieved; `manifest` is the name of what says so."""
        if self.presets.preset("models", label).local():
            return self.of(*self.presets.local_model_files(label))
        return self._hub(Path("results", label, manifest))

    def _hub(self, manifest: Path) -> dict[str, str]:
        """The files of a downloaded model, where one in the hub's cache is another than when the model was retrieved; else what
        the manifest's own job was planned with, which is nothing for a first download: a pinned revision has one content."""
        try:
            known = read_json(manifest)
        except (FileNotFoundError, InputError):  # its job has to run anyway
            return {}
        then = {str(Path(known["directory"], name)): digest for name, digest in known["files"].items()}
        now = {path: self.digests.of(path) if Path(path).is_file() else "absent" for path in then}
        return known["provenance"]["params"].get("files", {}) if now == then else now


def _seen(path: Path) -> list[int | str]:
    """What tells without reading a file that its content may have changed: what it is a link to, its size, times and inode.

    The time of the inode is among them, since `cp -p` and `touch -d` set the other one. The number of the device is not: one file
    system can have another on every node of a cluster.
    """
    stat = path.stat()
    return [os.path.realpath(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]


def _read(entry: Path) -> dict | None:
    """What was remembered; nothing if the entry was cut."""
    try:
        return json.loads(entry.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
