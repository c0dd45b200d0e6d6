"""The commands and code of the documentation: fenced blocks of README.md and docs/, for the tests that run them."""

import re

from tests.conftest import ROOT

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PROGRAMS = ("winnow ", "snakemake", "make ", "pip ", "python ", "mkdocs ")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)


def blocks(start: str = "", language: str | None = None, paths=PATHS) -> list[str]:
    """The different fenced blocks of the pages whose content begins so, in this language."""
    found = [block for path in paths for block in FENCED.findall(path.read_text(encoding="utf-8"))]
    return list(dict.fromkeys(text for name, text in found if text.startswith(start) and language in (None, name)))


def documented(*programs: str, paths=PATHS) -> list[str]:
    """The different lines of all blocks that begin with one of the programs, without their comments."""
    lines = [line.partition("  #")[0].strip().removeprefix("$ ") for block in blocks(paths=paths) for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line.startswith(programs)))
