"""Checks of a configuration that involve several presets: combinations in an experiment that do not work."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from winnow.allocation.base import ALLOCATIONS
from winnow.evaluation.kinds.classification import Classification
from winnow.metrics.base import METRICS
from winnow.models.architectures import TARGETS, Matrix, reaches_outer
from winnow.planning.config_errors import Located
from winnow.recovery.base import OnWindows, Trained
from winnow.recovery.kinds.sequential import Sequential
from winnow.structures.base import STRUCTURES
from winnow.structures.low_rank import LowRank

if TYPE_CHECKING:
    from winnow.planning.config import Config, Experiment

OF_OUTER = {"gram", "gradient_gram", "rms"}  # statistics of embeddings and head


def check_targets(config: Config, name: str, experiment: Experiment) -> None:
    """Raise Located for a budget's target of which the structure of a method supports no matrix, judged by roles alone: which
    roles a model has, and which matrices are fitted together, is only known with the model."""
    for method, b in itertools.product(experiment.methods, experiment.budgets):
        structure = STRUCTURES.build(config.methods[method].structure.model_dump())
        for target in config.budgets[b].targets:
            alone = [Matrix(0, role, role, role, (1, 1), False, False) for role in TARGETS.get(target, (target,))]
            if not any(structure.fits([m]) for m in alone):
                raise Located(
                    ("experiments", name),
                    f"{structure.kind()} ({method}) does not apply to {target!r}, a target of budget {b!r}; use the method in an "
                    "experiment whose budgets do not have this target",
                    ("methods", method),
                    ("budgets", b),
                )
        if reaches_outer(config.budgets[b].targets):
            _check_outer(config, name, experiment, method, b)


def _check_outer(config: Config, name: str, experiment: Experiment, method: str, b: str) -> None:
    """Raise Located for what is not possible with a budget that targets embeddings or the head."""
    both, metric = (("methods", method), ("budgets", b)), config.methods[method].metric
    what = f"budget {b!r} targets embeddings or the head"
    needs = set(METRICS[metric.kind].needs) if metric else set()
    if others := sorted(needs - OF_OUTER):
        raise Located(
            ("experiments", name),
            f"{what}, for which there is no {others[0]}, as the metric of {method!r} needs; use one of "
            f"{', '.join(kind for kind, cls in METRICS.items() if set(cls.needs) <= OF_OUTER)}, or other targets",
            *both,
        )
    allocation = ALLOCATIONS.build(config.budgets[b].spread_by(config.methods[method]).allocation.model_dump())
    if allocation.timing():
        message = f"{what}, whose time is not measured; remove `time` from its allocation, or use other targets"
        raise Located(("experiments", name), message, *both)
    for model in experiment.models:
        if config.models[model].load == "stream" and (needs or allocation.predicts()):
            message = f"{what}, whose statistics need the whole model, but {model!r} has `load: stream`; remove one of them"
            raise Located(("experiments", name), message, *both, ("models", model))
    for c in experiment.calibrations:
        if config.calibrations[c].task and (needs or allocation.predicts()):
            message = f"{what}, whose statistics need a text, but calibration {c!r} uses the rows of a task; calibrate on a text"
            raise Located(("experiments", name), message, *both, ("calibrations", c))


def check_allocations(config: Config, name: str, experiment: Experiment) -> None:
    """Raise Located for a method and a budget that cannot be combined."""
    for method, b in itertools.product(experiment.methods, experiment.budgets):
        allocation = ALLOCATIONS.build(config.budgets[b].spread_by(config.methods[method]).allocation.model_dump())
        structure = STRUCTURES.build(config.methods[method].structure.model_dump())
        members, both = structure.alternatives().values(), (("methods", method), ("budgets", b))
        if len(members) > 1 and not (allocation.chooses and allocation.predicts()):
            raise Located(
                ("experiments", name),
                f"{structure.kind()} ({method}) chooses between structures by predicted loss, which budget {b!r} does not; set "
                "its `keep_bytes`, and `allocation: {kind: ilp}` in it or in the method",
                *both,
            )
        if allocation.predicts() and not all(member.predicts for member in members):
            raise Located(
                ("experiments", name),
                f"budget {b!r} needs predicted losses, which {structure.kind()} ({method}) does not have; choose another "
                "`objective` or allocation for it",
                *both,
            )
        if allocation.timing() and not all(member.timed for member in members):
            raise Located(
                ("experiments", name),
                f"budget {b!r} bounds the time, which can be measured for "
                f"{', '.join(kind for kind, cls in STRUCTURES.items() if cls.timed)}, not for {structure.kind()} ({method}); "
                "remove `time` from its allocation, or use another method",
                *both,
            )
        if allocation.learns and not isinstance(structure, LowRank):
            raise Located(
                ("experiments", name),
                f"budget {b!r} learns the rank of a product of two factors, which {structure.kind()} ({method}) is not; choose "
                "another allocation for it, or low_rank or gauge_fixed",
                *both,
            )
        for c in (c for c in experiment.calibrations if config.calibrations[c].task and allocation.learns):
            raise Located(
                ("experiments", name),
                f"budget {b!r} learns from windows of a text, but calibration {c!r} uses the rows of a task; calibrate on a "
                "text, or choose another allocation",
                *both,
                ("calibrations", c),
            )


def check_exports(config: Config, name: str, experiment: Experiment) -> None:
    """Raise ValueError for exports of one checkpoint in different dtypes by two experiments: there is one export of each."""
    shared = ("models", "calibrations", "methods", "budgets", "recoveries")
    for other, one in config.experiments.items():
        same = all(set(getattr(experiment, section)) & set(getattr(one, section)) for section in shared)
        if same and one.export == experiment.export == "dense" and one.export_dtype != experiment.export_dtype:
            raise ValueError(
                f"experiments.{name}.export_dtype: {other!r} exports the same checkpoints in {one.export_dtype}, not "
                f"{experiment.export_dtype}; set the same in both, or write one of them with `python -m winnow export --dtype`"
            )


def check_training(config: Config, name: str, experiment: Experiment) -> None:
    """Raise Located for a recovery that has nothing to train, and if training uses the train rows of another task than the
    evaluated one: test rows are only compared with train rows of the same task."""
    recoveries = [step for r in experiment.recoveries for step in config.steps(r)]
    for method, r in itertools.product(experiment.methods, recoveries):
        recovery, structure = config.recoveries[r], STRUCTURES.build(config.methods[method].structure.model_dump())
        fixed = isinstance(recovery, Trained | Sequential.Options) and recovery.rounded == "fixed"
        fixed = fixed and not getattr(recovery, "norms", False)
        if fixed and (reason := structure.untrainable()):
            raise Located(
                ("experiments", name),
                f"recovery {r!r} has nothing to change in method {method!r}: {reason}; leave out `rounded: fixed` in the "
                f"recovery{', set `norms: true`,' if isinstance(recovery, Trained) else ''} or remove one of them",
                ("methods", method),
                ("recoveries", r),
            )
        if isinstance(recovery, Sequential.Options) and not structure.refits():
            raise Located(
                ("experiments", name),
                f"recovery {r!r} refits low-rank factors (of low_rank, gauge_fixed, basis_sharing) and rounded matrices, but "
                f"method {method!r} stores neither; use `refine`, or remove one of them",
                ("methods", method),
                ("recoveries", r),
            )
    used: list[tuple[str, ...]] = [("models", n, "finetune", "task") for n in experiment.models]
    used += [("calibrations", n, "task") for n in experiment.calibrations] + [("recoveries", n, "task") for n in recoveries]
    for c in (c for c in experiment.calibrations if config.calibrations[c].task):
        for r in (r for r in recoveries if isinstance(config.recoveries[r], OnWindows)):
            raise Located(
                ("experiments", name),
                f"recovery {r!r} needs windows of a text, but calibration {c!r} uses the rows of a task; calibrate on a text, or "
                "use the recovery `finetune`",
                ("recoveries", r),
                ("calibrations", c),
            )
    named, tasks = config.tasks_named(), {n: e for n, e in config.evaluations.items() if isinstance(e, Classification.Options)}
    for where, e in ((w, e) for w in used if w in named for e in experiment.evaluations if e in tasks):
        if tasks[e].training() != tasks[named[where]].training():
            raise Located(
                ("experiments", name),
                f"{'.'.join(where)} uses other train rows than evaluation {e!r}, whose test rows are only compared with its own "
                "train rows; set the same `train`, columns and labels",
                (where[0], where[1]),
                ("evaluations", e),
                ("evaluations", named[where]),
            )
