"""Draw docs/space.svg: which structures go with which metrics, allocations and recoveries, and how many presets do.

python docs/draw_space.py
"""

from pathlib import Path

import matplotlib
import yaml

matplotlib.use("svg")
import matplotlib.pyplot as plt

from winnow.allocation.base import ALLOCATIONS
from winnow.errors import InputError
from winnow.metrics.base import METRICS
from winnow.planning import presets
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.recovery.base import RECOVERIES
from winnow.structures.base import STRUCTURES

ROOT = Path(__file__).resolve().parents[1]
STUDY = yaml.safe_load((ROOT / "config" / "studies" / "structures.yaml").read_text(encoding="utf-8"))["methods"]
METHODS = {name: content | {"named": True} for name, content in presets.methods().items()} | STUDY


def accepted(method: dict, allocation: str | None, recovery: str) -> bool:
    """Whether the configuration accepts an experiment with this method, allocation and recovery on FFNs."""
    config = default()
    budget = {"targets": ["ffn"], "keep_bytes": 0.5}
    budget |= {"allocation": {"kind": allocation}} if allocation else {}
    one = {"models": ["demo"], "calibrations": ["demo"], "evaluations": ["demo"], "methods": ["m"], "budgets": ["b"]}
    config |= {"methods": {"m": method}, "budgets": {"b": budget}, "recoveries": {"r": {"kind": recovery}}}
    config["experiments"] = {"e": one | {"recoveries": ["r"]}}
    try:
        load(config)
    except InputError:
        return False
    return True


def main() -> None:
    """Rows are structures; a light square is a combination that is accepted, a number says how many presets have it.

    `finetune` trains all weights of a classifier, so it is the same for all structures and left out."""
    recoveries = [kind for kind in RECOVERIES if kind not in ("none", "finetune")]
    panels = {"metric": [*METRICS, "none"], "allocation": [*ALLOCATIONS], "recovery": recoveries}
    plt.rcParams.update({"svg.hashsalt": "winnow", "font.size": 9, "svg.fonttype": "none"})
    widths = [len(columns) for columns in panels.values()]
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 6), sharey=True, gridspec_kw={"width_ratios": widths, "wspace": 0.08})
    for axis, (panel, columns) in zip(axes, panels.items(), strict=True):
        for row, kind in enumerate(STRUCTURES):
            own = [content for content in METHODS.values() if content["structure"]["kind"] == kind]
            for place, column in enumerate(columns):
                draw(axis, row, place, *of_cell(panel, column, own))
        axis.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(STRUCTURES) - 0.5, -0.5), xlabel=panel)
        axis.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor")
        axis.xaxis.tick_top()
        axis.tick_params(length=0)
        axis.spines[:].set_color("#dddddd")
    axes[0].set_yticks(range(len(STRUCTURES)), STRUCTURES)
    axes[0].set_ylabel("structure")
    figure.savefig(ROOT / "docs" / "space.svg", metadata={"Date": None}, bbox_inches="tight")


def of_cell(panel: str, column: str, own: list[dict]) -> tuple[int, bool]:
    """(presets of a structure that have the column's kind, whether any of its methods is accepted with it)"""
    methods = [{key: value for key, value in content.items() if key not in ("named", "allocation")} for content in own]
    if panel == "recovery":
        options = [{"allocation": "ilp"} if m["structure"]["kind"] == "mixed" else {"allocation": None} for m in methods]
        return 0, any(accepted(m, **o, recovery=column) for m, o in zip(methods, options, strict=True))
    kinds = [content.get(panel, {"kind": "uniform" if panel == "allocation" else "none"}) for content in own]
    count = sum(kind["kind"] == column for kind, content in zip(kinds, own, strict=True) if "named" in content)
    if panel == "allocation":
        return count, any(accepted(m, column, "none") for m in methods)
    changed = [{**m, "metric": {"kind": column}} for m in methods] if column != "none" else []
    return count, count > 0 or any(accepted(m, "ilp" if m["structure"]["kind"] == "mixed" else None, "none") for m in changed)


def draw(axis: plt.Axes, row: int, place: int, count: int, possible: bool) -> None:
    if not possible:
        return
    axis.add_patch(plt.Rectangle((place - 0.42, row - 0.42), 0.84, 0.84, color="#2b6cb0" if count else "#bcd3ea"))
    if count:
        axis.text(place, row, str(count), ha="center", va="center", color="white", fontsize=7)


if __name__ == "__main__":
    main()
