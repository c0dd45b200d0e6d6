"""What is known of the matrices of a plan's models before anything is computed, and whether runtimes run them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from winnow.allocation.runtimes import check_sizes
from winnow.errors import InputError
from winnow.models.shape import Shape, shape_of
from winnow.planning.plan import Plan


def known_shapes(plan: Plan, names: Iterable[str]) -> dict[str, Shape]:
    """{model: its shape} of the presets of these names that are local or were retrieved into `results`."""
    found = {}
    for name in dict.fromkeys(names):
        manifest, model = Path("results") / plan.labels["models"][name] / "model.json", plan.config.models[name]
        if model.local() or manifest.is_file():
            found[name] = shape_of(Path(model.source), manifest, model.stored_dtype)
    return found


def check_runtimes(plan: Plan) -> None:
    """Raise InputError for a budget whose allocation has a `runtime` that runs no size of a targeted matrix, as far as the shapes
    of the models are known; the allocation checks the others."""
    asked = dict.fromkeys((cell.model, cell.method, cell.budget) for cell in plan.cells if cell.method and cell.budget)
    runtimes = {key: plan.allocation(plan.labels["budgets"][key[2]]).runtime() for key in asked if key[2]}
    restricted = {key: runtime for key, runtime in runtimes.items() if runtime != "any"}
    shapes = known_shapes(plan, (model for model, _, _ in restricted))
    for (model, method, budget), runtime in restricted.items():
        if model in shapes:
            structure = plan.structure(plan.labels["methods"][str(method)])
            try:
                check_sizes(
                    structure, [*shapes[model].matrices, *shapes[model].outer], plan.config.budgets[str(budget)].targets, runtime
                )
            except InputError as error:
                name = plan.budget_name(str(budget))
                raise InputError(f"method {method!r}, budget {name!r}, model {model!r}: {error}") from error
