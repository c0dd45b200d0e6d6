"""What the jobs behind a result took, from the files that Snakemake writes beside results; and the machine that reads them.

Times are of the jobs of record: no result depends on them, so nothing is made anew if they change, or are gone.
"""

from __future__ import annotations

import csv
import os
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from winnow.errors import InputError
from winnow.io.provenance import provenance_of

PREPARING = ("retrieve_", "demo_", "tokenize", "check_overlap", "finetune")  # rules of what is there before compression


@dataclass(frozen=True)
class JobTime:
    """A finished job. `seconds` and `memory` (bytes, peak) are None where there is no record."""

    rule: str
    labels: tuple[str, ...]
    seconds: float | None
    memory: float | None
    device: str  # empty where its log does not say


class Times:
    """The jobs behind artefacts, followed from each to its inputs by their provenance."""

    def __init__(self, results: Path = Path("results")):
        self.results = results
        self._behind: dict[str, frozenset[JobTime]] = {}

    def behind(self, path: str) -> frozenset[JobTime]:
        """The jobs that an artefact comes from, its own included, without those that prepare models and texts. What is damaged or
        gone has none."""
        if path not in self._behind:
            self._behind[path] = frozenset()  # also while its inputs are asked for
            try:
                provenance = provenance_of(Path(path))
            except (InputError, OSError, ValueError):
                return self._behind[path]
            found = set()
            if not provenance["rule"].startswith(PREPARING):
                found.add(self._job(provenance["rule"], tuple(provenance["wildcards"].values())))
                for name in provenance["inputs"]:
                    found |= self.behind(name)
            self._behind[path] = frozenset(found)
        return self._behind[path]

    def _job(self, rule: str, labels: tuple[str, ...]) -> JobTime:
        name = "/".join([rule, *labels])
        log, told = self.results / "logs" / f"{name}.log", None
        if log.is_file():
            told = re.search(r"device (\w+), (\d+) threads", log.read_text(encoding="utf-8", errors="replace"))
        seconds, memory = _measured(self.results / "benchmarks" / f"{name}.tsv")
        return JobTime(
            rule, labels, seconds, memory, f"{told[1]}, {told[2]} thread{'s' if told[2] != '1' else ''}" if told else ""
        )


def _measured(path: Path) -> tuple[float | None, float | None]:
    """(seconds, bytes of the largest resident set) of a benchmark file; None where it says nothing: jobs of a fraction of a
    second have no measured memory."""
    if not path.is_file():
        return None, None
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream, delimiter="\t"))
    return _largest(rows, "s", 1.0), _largest(rows, "max_rss", 2.0**20)


def _largest(rows: list[dict[str, str]], column: str, unit: float) -> float | None:
    found = [row.get(column) or "" for row in rows]
    numbers = [unit * float(text) for text in found if re.fullmatch(r"\d+(\.\d+)?", text)]
    return max(numbers, default=None)


def total(jobs: Iterable[JobTime]) -> float | None:
    """Seconds of all jobs together; None if there are none, or one has no record."""
    seconds = [job.seconds for job in jobs]
    return sum(s for s in seconds if s is not None) if seconds and None not in seconds else None


def here() -> dict[str, str | int | float | list[str]]:
    """This machine: its processor, cores, bytes of memory, and the GPUs that the driver lists."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file() and (named := re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), flags=re.MULTILINE)):
        processor = named[1].strip()
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    files = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    gpus = [found[1].strip() for file in files if (found := re.search(r"^Model:(.+)$", file.read_text(), flags=re.MULTILINE))]
    return {"processor": processor, "cores": os.cpu_count() or 1, "memory": memory, "gpus": gpus}
