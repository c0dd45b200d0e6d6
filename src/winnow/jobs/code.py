"""That a job runs the code that its fingerprints were taken of.

Fingerprints are of the files of a checkout. Which `winnow` Python imports is another matter: a plain installation or another
clone's editable one can come first, and files can be edited after a run was planned. So the sources of the package are kept as
they are imported, and compared with the fingerprints when a result is sealed.
"""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

from winnow.errors import InputError
from winnow.io.records import Params
from winnow.planning.fingerprints import MEMORY, PACKAGE, remembered

CURE = "run snakemake again"
_sources: dict[str, tuple[str, bytes]] = {}  # of every module of the package imported so far: name and content of its file


def note_imports() -> None:
    """Keep the sources of modules that were imported since the last call. A process that others are forked from calls this when
    its imports end: what it holds in memory is what runs in them, whatever happens to the files."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == PACKAGE and name not in _sources and getattr(module, "__file__", None):
            path = Path(str(module.__file__))
            _sources[name] = path.name, path.read_bytes()


def check_place(root: Path) -> None:
    """Raise InputError if the package that was imported is not that of the checkout `root`."""
    expected, found = root / "src" / PACKAGE, Path(__file__).parents[1]
    if not found.samefile(expected):
        raise InputError(
            f"the workflow is in {root}, but Python imports {PACKAGE} from {found}: results would be recorded with code that did "
            f"not make them. Run in an environment without that package, or with PYTHONPATH={expected.parent}"
        )


def keep_to(root: Path) -> None:
    """Have all Python processes that are started from this one import the package of the checkout `root`, whatever winnow is
    installed. Raises InputError if this process does not."""
    check_place(root)
    others = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([str(root / "src"), *filter(None, others)]))


def check_code(params: Params) -> None:
    """Raise InputError if a module that was imported is not the one whose digest is in a job's `code`.

    Modules that were imported and are not in `code` are not reached by the job: other jobs' modules are in a fork's memory, too.
    """
    note_imports()
    for line in params.get("code", ()):
        name, digest = line.split()
        if name in _sources:
            _check(name, digest, *_sources[name])


def check_scripts(folder: Path, params: Params) -> None:
    """Raise InputError if a job's script, in `folder`, is not the one whose digest is in its `code`."""
    for name, digest in (line.split() for line in params.get("code", ())):
        if name.endswith(".py"):
            _check(name, digest, name, (folder / name).read_bytes())


@cache
def _check(name: str, digest: str, file: str, source: bytes) -> None:
    """Compare a file with a digest of its code."""
    memory = MEMORY if MEMORY.is_dir() else None
    module = "" if name.endswith(".py") else name
    if digest != remembered(source, file, module, memory)[0]:
        raise InputError(f"{name} is not the code that this run was planned with: it was edited in the meantime; {CURE}")
