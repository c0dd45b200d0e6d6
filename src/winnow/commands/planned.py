"""The plan of a configuration outside of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from winnow.errors import InputError

if TYPE_CHECKING:
    from winnow.planning.plan import Plan

DEFAULT = Path("config/config.yaml")  # in the checkout


def checkout() -> Path:
    """The folder of the workflow, its code and its default configuration: the current one, or that of an --editable installation.
    Raises InputError if neither is a checkout."""
    for folder in (Path.cwd(), Path(__file__).resolve().parents[3]):
        if (folder / DEFAULT).is_file() and (folder / "src" / "winnow").is_dir():
            return folder
    raise InputError(f"{Path.cwd()}: not a checkout of winnow, whose code and configuration are compared; run it in one")


def plan_of(files: list[Path], replace: bool) -> Plan:
    """The plan of a configuration as Snakemake merges it: the default file, then `files`, key by key."""
    from winnow.planning.config import load
    from winnow.planning.config_sources import anchored, merged, sources
    from winnow.planning.plan import Plan

    root = checkout()
    parts = sources([] if replace else [root / DEFAULT], files)
    return Plan(load(anchored(merged(parts), parts, root), parts), root)
