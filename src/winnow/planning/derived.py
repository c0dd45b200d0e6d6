"""Presets derived from those of the configuration: random controls, seeds, members, those of studies, and budgets with a method's
allocation. Each function adds to the given presets, and returns which names belong together.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from winnow.errors import InputError
from winnow.planning.config import Budget, Calibration, Config, Method, random_control
from winnow.recovery.base import recovery_of
from winnow.studies.base import NONE, STUDIES, study_of


def _content(method: Method) -> tuple[Any, ...]:
    """The content that identifies a method: everything but its paper."""
    return method.structure, method.metric, method.allocation


def with_controls(config: Config) -> tuple[dict[str, Method], dict[str, str]]:
    """All methods with their random controls, and {method: its control} by name. Presets of the same content are reused.

    Raises InputError if another preset has the name of a control.
    """
    methods, controls = dict(config.methods), {}
    for name, method in config.methods.items():
        control = random_control(method)
        if control:
            same = sorted(other for other, m in config.methods.items() if _content(m) == _content(control))
            controls[name] = same[0] if same else f"{name}.random"
            if not same and controls[name] in config.methods:
                where = f"methods.{controls[name]}"
                raise InputError(f"{where}: the name is taken by the random control of {name!r}; rename the preset")
            methods.setdefault(controls[name], control)
    return methods, controls


def calibrations_by_seed(config: Config) -> tuple[dict[str, Calibration], dict[str, str]]:
    """All calibrations, one seed each, and {name: its preset}.

    Raises InputError if a preset has the name of another one's seed."""
    found: dict[str, Calibration] = {}
    presets: dict[str, str] = {}
    for name, preset in config.calibrations.items():
        for of_seed, calibration in preset.by_seed(name).items():
            if calibration.task is not None:  # its rows are as long as the task says
                task: Any = config.evaluations[calibration.task]
                calibration = calibration.model_copy(update={"length": task.length})
            if of_seed != name and of_seed in config.calibrations:
                raise InputError(f"calibrations.{of_seed}: the name is taken by a seed of {name!r}; rename the preset")
            found[of_seed], presets[of_seed] = calibration, name
    return found, presets


def add_studies(methods: dict[str, Method], budgets: dict[str, Budget], recoveries: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Add the presets of all studies to the configured ones; {study: {name in the study: name in the configuration}}.

    Presets of the same content are reused, whatever their name."""
    found: dict[str, dict[str, str]] = {}
    for study in STUDIES:
        own = study_of(study)
        found[study] = {}
        for name, content in own.methods.items():
            method = Method.model_validate(content)
            same = [other for other, m in methods.items() if _content(m) == _content(method)]
            found[study][name] = same[0] if same else f"{study}.{name}" if name in methods else name
            methods.setdefault(found[study][name], method)
        for name, content in own.budgets.items():
            budget = Budget.model_validate(content)
            alike = [other for other, b in budgets.items() if b == budget]
            found[study][name] = alike[0] if alike else f"{study}.{name}" if name in budgets else name
            budgets.setdefault(found[study][name], budget)
        found[study][NONE] = NONE
        for name, content in own.recoveries.items():
            recovery = recovery_of(content).options
            equal = [other for other, r in recoveries.items() if r == recovery]
            found[study][name] = equal[0] if equal else f"{study}.{name}" if name in recoveries else name
            recoveries.setdefault(found[study][name], recovery)
    return found


def add_members(methods: dict[str, Method]) -> dict[str, list[str]]:
    """Add the methods that have a method's factors: one for every structure between which it chooses, or the same method without
    its allocation; {method: those methods}, by name. Presets of the same content are reused, so that both share factors; any
    other method has its own.

    Raises InputError if another preset has the name of a member."""
    found: dict[str, list[str]] = {}
    for name, method in sorted(methods.items()):
        members = method.members()
        alone = len(members) == 1 and method.allocation is None
        found[name] = [name] if alone else []
        for member in members if not alone else []:
            same = sorted(other for other, m in methods.items() if _content(m) == _content(member))
            own = same[0] if same else f"{name}.{member.structure.kind}"
            if not same and own in methods:
                raise InputError(f"methods.{own}: the name is taken by a member of {name!r}; rename the preset")
            found[name].append(own)
            methods.setdefault(own, member)
            found.setdefault(own, [own])
    return found


def add_budgets(config: Config, methods: dict[str, Method], budgets: dict[str, Budget]) -> dict[tuple[str, str], str]:
    """Add every budget with the allocation of a method, if the budget has none; {(method, budget): the added one}, by name.

    Raises InputError if another preset has its name."""
    found: dict[tuple[str, str], str] = {}
    for (method, preset), (name, budget) in product(methods.items(), config.budgets.items()):
        spread = budget.spread_by(preset)
        if spread is not budget:
            own = found[method, name] = f"{name}.{method}"
            if own in budgets:
                raise InputError(f"budgets.{own}: the name is taken by {name!r} as {method!r} spreads it; rename the preset")
            budgets[own] = spread
    return found
