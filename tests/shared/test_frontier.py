"""The frontier study on the trained models beside the checkout: the recommended preset beside every other, as compressed, and
beside every recipe with the same recovery for all."""

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.shared.test_references import experiments, pytestmark, run
from winnow.planning.config_files import default

__all__ = ["pytestmark"]
LONG = "whitened_learned"  # takes a minute for every budget, seed and model
REACHED = {"one_sided": ("0.6", "0.4"), "tied": ("0.4",)}  # what sections of several layers can store in all these models
COARSE = {"stories": {"coupled", "coupled_anchored"}}  # so few sizes, in a model this small, that some budgets are missed
ASKED = {"none": [None], "sequential": [["fitted_refined"]], "refined": [["fitted_refined"], ["refined"]]}  # of the studies


def frontier(recovery: str = "none") -> dict:
    """The experiments of config/studies/frontier.yaml for every model in the place of the demo, and the other presets beside
    them, of config/studies/presets.yaml or presets_recovered.yaml. `recovery`: none; sequential: the part in closed form, for
    all that it can fit; refined: all of the recovery of these studies, with a quarter of the steps."""
    config, places = experiments(), experiments()["experiments"]
    config["experiments"], config["recoveries"] = {}, default()["recoveries"]
    for name in ["frontier", "presets" if recovery == "none" else "presets_recovered"]:
        study = yaml.safe_load((ROOT / f"config/studies/{name}.yaml").read_text())
        config["budgets"] |= study["budgets"]
        for preset in config["calibrations"].values():
            preset["seeds"] = study["calibrations"]["demo-3"]["seeds"]
        for refined in study.get("recoveries", {}) if recovery == "refined" else ():
            config["recoveries"][refined] = {**study["recoveries"][refined], "steps": 10}
        for part, experiment in study["experiments"].items():
            if experiment.get("recoveries") in ASKED[recovery] and "affine" not in part:  # those are at bytes of the demo's FFN
                own = {"recoveries": ["sequential"]} if recovery == "sequential" else {}
                own["budgets"] = [b for b in experiment["budgets"] if b.endswith(REACHED.get(part, ""))]
                for place, given in places.items():
                    left_out = {LONG, *COARSE.get(place, ())}
                    where = {key: given[key] for key in ("models", "calibrations", "evaluations")}
                    where["methods"] = [method for method in experiment["methods"] if method not in left_out]
                    config["experiments"][f"{place}-{name}-{part}"] = {**experiment, **where, **own}
    for evaluation in config["evaluations"].values():
        evaluation |= {"windows": 128, "compare": False}
    return config


def shown(folder: str) -> pd.DataFrame:
    """spread.csv, which is printed as well: a row per model and method, a column per budget."""
    spread = pd.read_csv(f"{folder}/results/tables/spread.csv")
    print(spread.pivot_table(index=["model", "method"], columns="budget", values="delta_nll").to_string(float_format="%.5f"))
    return spread


@pytest.mark.slow
def test_the_recommended_preset_is_the_best_or_tied_nearly_everywhere(tmp_path):
    """Hours on two cores (4,122 cells); prints the table. Where it is not, what others do happens to make the model better on
    this text, though not on the calibration text; see tests/benchmarks/first_order.py."""
    _, folder = run(frontier(), tmp_path)
    spread = shown(folder)
    own = spread[spread["method"] == "winnow"]
    assert len(own) == 5 * 8
    assert own["tie"].sum() >= 38
    assert own["delta_nll"].max() < 0.002
    losses = spread.pivot_table(index=["model", "budget"], columns="method", values="delta_nll").dropna(subset=["winnow"])
    assert (losses["whitened_ilp"] < losses["whitened"]).mean() > 0.9


@pytest.mark.slow
def test_it_is_the_best_or_tied_after_the_same_recovery_too(tmp_path):
    """Hours on two cores (900 cells); prints the table."""
    _, folder = run(frontier("sequential"), tmp_path)
    spread = shown(folder)
    own = spread[(spread["method"] == "winnow") & (spread["recovery"] == "sequential")]
    assert len(own) == 5 * 8
    assert own["tie"].sum() >= 38


@pytest.mark.slow
def test_it_is_the_best_or_tied_after_refinement_too(tmp_path):
    """Hours on two cores (2,982 cells); prints the table."""
    _, folder = run(frontier("refined"), tmp_path)
    spread = shown(folder)
    spread = spread.set_index(["model", "budget"])  # both recoveries together: not all can be fitted anew
    best = spread.sort_values("delta_nll").groupby(level=[0, 1]).first()
    own = spread[spread["method"] == "winnow"].loc[best.index]
    assert len(own) == 5 * 8
    errors = (own["delta_nll_se"] ** 2 + best["delta_nll_se"] ** 2) ** 0.5
    tie = own["delta_nll"] - best["delta_nll"] <= 2 * errors
    assert own["delta_nll"].max() < 0.002
    assert (tie.groupby(level=0).sum() >= 7).all()  # of 8: at ffn-0.9 others leave three models better than dense
