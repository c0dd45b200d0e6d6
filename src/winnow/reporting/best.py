"""The summary of the report: what was asked, and the best method at each budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd

from winnow.evaluation.spread import is_as_dense
from winnow.reporting.chosen import dense_bits, name_of
from winnow.reporting.formats import perplexity, size, with_error

if TYPE_CHECKING:
    from winnow.evaluation.results import LossResult

COMPARED = ["model", "evaluation", "targets", "budget", "calibration", "recovery"]  # within one, methods are compared
NAMED = 3  # ties that are named


def best_by_budget(spread: pd.DataFrame, summary: pd.DataFrame, preset_of: Mapping[str, str]) -> list[dict[str, Any]]:
    """The method with the lowest loss of every budget: its row of `spread`, the mean `kl` of its seeds, the position `at` of the
    first of them in `summary` (None if it is not there), and `verdict`: how sure the first place is. `preset_of`: {calibration
    with its seed: its preset}."""
    presets = summary["calibration"].map(lambda name: preset_of.get(name, name))
    groups = summary.assign(calibration=presets).groupby([*COMPARED, "method"], dropna=False)
    keyed: dict[Any, pd.DataFrame] = {key: summary.loc[rows] for key, rows in groups.groups.items()}
    found = []
    for key, cells in spread.groupby(COMPARED, sort=False, dropna=False):
        best: dict[str, Any] = cells[cells["method"] == cells["best"]].iloc[0].to_dict()  # type: ignore[assignment]
        own = keyed.get((*key, best["method"]))
        of_best = {"kl": float("nan"), "at": None} if own is None else {"kl": own["kl"].mean(), "at": own.index[0]}
        found.append({**best, **of_best, "verdict": _verdict(cells, best)})
    return found


def _verdict(cells: pd.DataFrame, best: Mapping[str, Any]) -> str:
    """Whether the best of a budget is better than the others by more than two standard errors."""
    others = cells[cells["method"] != best["method"]].sort_values("above_best", kind="stable")
    ties = others[others["tie"].astype(bool)]["method"].tolist()
    more = f" and {len(ties) - NAMED} more" if len(ties) > NAMED else ""
    if not len(others):
        text = "the only method"
    elif ties:
        text = f"no: tied with {', '.join(ties[:NAMED])}{more}"
    else:
        second = others.iloc[0]
        text = f"yes: {second['method']} is {with_error(second['above_best'], second['above_best_se'])} above it"
    return text + ("; as dense" if is_as_dense(best) else "")


def question(
    summary: pd.DataFrame,
    results: Sequence[LossResult],
    allocations: Iterable[Mapping[str, Any]],
    models: Sequence[Mapping[str, Any]],
) -> list[tuple[str, list[str]]]:
    """What the experiments compare, as (term, lines)."""
    cells = summary[summary["method"] != "dense"]
    bits, kinds = dense_bits(models), {name_of(one): one["model_type"] for one in models}
    dense: list[str] = []
    evaluations: list[str] = []
    calibrations: dict[str, str] = {}
    for position, row in summary[(summary["method"] == "dense") & (summary["recovery"] == "none")].iterrows():
        told = [kinds.get(row["model"], ""), size(row["model_dense_bytes"])]
        told += [f"{bits[row['model']]:.3g} bits per number"] if row["model"] in bits else []
        dense.append(f"{row['model']} ({', '.join(part for part in told if part)})")
        protocol = results[position]["protocol"]  # type: ignore[call-overload]
        own = f"{row['windows']:,} windows of {protocol['length']:,} tokens, {row['tokens']:,} scored"
        loss = f"{with_error(row['nll'], row['nll_se'])} nats per token, perplexity {perplexity(row['perplexity'])}"
        evaluations.append(f"{row['evaluation']}: {own}; the dense {row['model']} has {loss}")
    for allocation in allocations:
        spec = allocation["provenance"]["params"]["spec"]
        options, name = spec["presets"]["calibration"], spec["names"]["calibration"]
        source = options.get("text") or options.get("task")
        windows, length = options["windows"], options["length"]
        calibrations[name] = f"{name}: {windows:,} windows of {length:,} tokens ({windows * length:,}) of {source}"
    by_target: dict[str, list[str]] = {}
    for targets, block in cells.groupby("targets", sort=False):
        shares = block.groupby("budget", sort=False)["keep_bytes"].mean().to_dict()
        by_target[str(targets)] = [f"{budget} ({100 * share:.1f} % of the bytes)" for budget, share in shares.items()]
    facts = {
        "models": list(dict.fromkeys(dense)),
        "calibration": list(calibrations.values()) or [", ".join(map(str, cells["calibration"].unique()))],
        "methods": [f"{cells['method'].nunique()}: {', '.join(map(str, cells['method'].unique()))}"],
        "budgets": [f"{targets.replace('+', ' + ')}: {', '.join(names)}" for targets, names in by_target.items()],
        "evaluation": evaluations,
    }
    recoveries = [name for name in cells["recovery"].unique() if name != "none"]
    return [*facts.items(), *([("recovery", [", ".join(recoveries)])] if recoveries else [])]
