"""What an artefact was made from, all the way up, and what in today's tree differs from it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from winnow.errors import InputError
from winnow.io.artifacts import check_whole, file_digest
from winnow.io.provenance import provenance_of
from winnow.io.records import Params, Provenance
from winnow.planning.plan import Plan


def differences(provenance: Provenance, plan: Plan, directory: Path = Path()) -> list[str]:
    """What would be other if the artefact were made today, a line each; none if it is up to date by itself.

    `directory` is where the run's relative paths start.
    """
    rule, wildcards, params = provenance["rule"], provenance["wildcards"], provenance["params"]
    stage = plan.stage_of_rule.get(rule, rule)
    gone = [f"{name} {label}" for name, label in wildcards.items() if not plan.knows(name, label)]
    if gone:
        return [f"no preset of the configuration has the label of {', '.join(gone)}"]
    try:
        today = plan.params(stage, wildcards)
    except InputError as error:  # a library that it was made with, or a file that it was made from, is not here
        return [str(error)]
    lines = list(_changed_params(params, today))
    for name, digest in provenance["inputs"].items():
        if name in params.get("files", {}):  # of the user, and looked at with the params
            continue
        path = directory / name
        if not path.is_file():
            lines.append(f"input: {name} is gone")
        elif file_digest(path) != digest:
            lines.append(f"input: {name} has other content")
    return lines


def difference(outputs: list[str], today: Params) -> str | None:
    """The first difference between the params that the outputs of a job hold and those of `today`; None if there is none.

    Outputs for people only hold none; one of a job that does speaks for all.
    """
    for output in outputs:
        try:
            return next(_changed_params(provenance_of(Path(output))["params"], today), None)
        except InputError as error:
            reason = str(error).partition(": ")[2]
    return reason


def finished(outputs: list[str], today: Params) -> bool:
    """Whether every output of a job is whole and was made with the params of `today` from the inputs that are there now."""
    for output in outputs:
        path = Path(output)
        try:
            check_whole(path)
            provenance = provenance_of(path)
        except InputError:  # absent, damaged, or without a provenance
            return False
        if next(_changed_params(provenance["params"], today), None):
            return False
        inputs = {name: digest for name, digest in provenance["inputs"].items() if name not in today["files"]}
        if any(not Path(name).is_file() or file_digest(name) != digest for name, digest in inputs.items()):
            return False
    return True


def _changed_params(then: Params, now: Params) -> Iterator[str]:
    files, today = then.get("files", {}), now.get("files", {})
    for name in sorted(files | today):
        if files.get(name) != today.get(name):
            yield f"input: {name} {'is gone' if name not in today else 'has other content' if name in files else 'is new'}"
    yield from _changes("", then.get("spec", {}), now["spec"])
    old, new = ({line.split()[0]: line.split()[1] for line in part["code"]} for part in (then, now))
    for name in sorted(old | new):
        if old.get(name) != new.get(name):
            yield f"code: {name} {_change(old, new, name)}"
    yield from (f"version of {change}" for change in _changes("", then["versions"], now["versions"]))


def _changes(where: str, then: Any, now: Any) -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then | now):
            yield from _changes(f"{where}.{key}" if where else key, then.get(key), now.get(key))
    elif then != now:
        yield f"{where}: {json.dumps(then)} then, {json.dumps(now)} now"


def _change(then: dict[str, str], now: dict[str, str], name: str) -> str:
    if name not in now:
        return "is not reached any more"
    return "is new" if name not in then else f"{then[name]} then, {now[name]} now"


def explain(path: Path, plan: Plan, directory: Path = Path(), depth: int = 0, seen: set[Path] | None = None) -> Iterator[str]:
    """Lines that tell how `path` was made and what differs today, then the same of its inputs, indented."""
    seen = set() if seen is None else seen
    margin, provenance = "  " * depth, provenance_of(path)
    seen.add(path.resolve())
    yield f"{margin}{path}"
    yield f"{margin}  made by {provenance['rule']}, from {len(provenance['params']['code'])} modules of code"
    versions = ", ".join(f"{name} {version}" for name, version in provenance["params"]["versions"].items())
    yield f"{margin}  versions: {versions or 'none that matter'}"
    if provenance["params"].get("spec"):
        yield f"{margin}  params: {json.dumps(provenance['params']['spec'])}"
    changed = differences(provenance, plan, directory)
    yield from (f"{margin}  differs today: {line}" for line in changed)
    if not changed:
        yield f"{margin}  up to date: the same params, code, versions and inputs"
    for name, digest in provenance["inputs"].items():
        parent = directory / name
        if parent.resolve() in seen:
            yield f"{margin}  from {name} (above)"
            continue
        try:
            yield from explain(parent, plan, directory, depth + 1, seen)
        except (InputError, ValueError):
            yield f"{margin}  from {name}, sha256 {digest[:16]}"
