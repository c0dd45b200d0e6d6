"""The studies of rounding on the trained models beside the checkout: every preset from 0.60 to 0.12 of the bytes, and one
ingredient of rounding after the other."""

import pytest
import yaml

from tests.conftest import ROOT
from tests.shared.test_frontier import shown
from tests.shared.test_references import experiments, pytestmark, run
from winnow.planning.config_files import default

__all__ = ["pytestmark"]
WT2 = {"wt2-llama", "wt2-gpt2", "wt2-opt", "wt2-neox"}
AT = {"models", "calibrations", "evaluations"}
IN_32_BITS = {"stories260K"}  # budgets are shares of what is stored


def study(name: str, models: set[str]) -> dict:
    """A study of config/studies with trained models, their texts and windows in the place of the demo's."""
    config, own = experiments(), yaml.safe_load((ROOT / f"config/studies/{name}.yaml").read_text())
    places = {place: {key: given[key] for key in AT} for place, given in config["experiments"].items()}
    config["methods"] |= own.get("methods", {})
    config["budgets"] = own["budgets"]
    config["recoveries"] = default()["recoveries"] | own.get("recoveries", {})
    config["experiments"] = {}
    for preset in config["calibrations"].values():
        preset |= {"seeds": own["calibrations"]["demo-3"]["seeds"]} if "calibrations" in own else {}
    for evaluation in config["evaluations"].values():
        evaluation |= {"windows": 128, "compare": True}
    shares = {name: budget for name, budget in own["budgets"].items() if "keep_bytes" in budget}
    halves = {name: name.replace("all-", "half-").replace("near-", "near-half-") for name in shares}
    config["budgets"] |= {half: shares[name] | {"keep_bytes": shares[name]["keep_bytes"] / 2} for name, half in halves.items()}
    for part, experiment in own["experiments"].items():
        for place, where in places.items():
            for kind, chosen in (("", set(where["models"]) - IN_32_BITS), ("-half", set(where["models"]) & IN_32_BITS)):
                if chosen & models:
                    budgets = [halves.get(name, name) if kind else name for name in experiment["budgets"]]
                    here = {**where, "models": sorted(chosen & models), "budgets": budgets}
                    config["experiments"][f"{place}-{part}{kind}"] = {**experiment, **here}
    return config


@pytest.mark.slow
def test_the_recommended_preset_is_the_closest_at_low_bytes(tmp_path):
    """Hours on two cores; prints the table. By divergence: losses below 0.01 nats have a signed first-order part."""
    _, folder = run(study("low_bytes", WT2 | {"stories260K"}), tmp_path)
    spread = shown(folder)
    spread = spread[spread["budget"].str.match("all-|half-")]
    cell = ["model", "budget", "recovery"]
    spread = spread[spread.groupby(cell)["method"].transform("nunique") > 1]  # others have `winnow` alone
    best = spread.loc[spread.groupby(cell)["kl"].idxmin()]
    assert (best["method"] == "winnow").mean() > 0.9


@pytest.mark.slow
def test_every_ingredient_of_rounding(tmp_path):
    """Minutes; prints the table of the ablation on one model."""
    table, _ = run(study("rounding_ablation", {"wt2-llama"}), tmp_path)
    table = table[table["method"] != "dense"]
    print(table[["method", "recovery", "budget", "keep_bytes", "delta_nll", "delta_nll_se", "kl"]].to_string(index=False))
    kl = table[table["recovery"] == "none"].set_index(["method", "budget"])["kl"]
    for keep in ("0.22", "0.16"):
        order = ["one_nearest", "one_scales", "one_grid", "one_gram", "one_two_sided"]
        steps = [kl[name, f"one-{keep}"] for name in order] + [kl["rounded_two_sided", f"all-{keep}"]]
        assert steps[-1] < steps[2] < steps[0]
        assert steps[4] < steps[3]
