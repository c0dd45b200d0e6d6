"""Budgets that are allocated by predicted loss: which jobs they ask for, and that uniform ones do not."""

import json
import os
import sys
from collections import Counter

import pytest

from tests.conftest import ROOT
from tests.dry_runs import dry_run
from tests.unit.test_checkpoint import logits
from tests.workflow.test_end_to_end import Workspace
from winnow.checkpoint.loading import load_model

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
PREDICTING = ("collect_gradients", "predict_losses", "predict_in_rounds")


def test_predicted_losses_are_made_for_the_budgets_that_read_them(tmp_path):
    place = Workspace(tmp_path)
    one = place.config["experiments"]["one"]
    one |= {"methods": ["whitened"], "budgets": ["ffn-0.8"]}
    assert not set(place.planned()) & set(PREDICTING), "a uniform budget asks for no backward pass"
    place.config["budgets"]["ilp"] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": {"kind": "ilp"}}
    one["budgets"] = ["ffn-0.8", "ilp"]
    planned = place.planned()
    assert {rule: planned[rule] for rule in PREDICTING} == dict.fromkeys(PREDICTING[:2], 1) | {"predict_in_rounds": 0}
    assert planned["collect_outer"] == 0, "no budget targets embeddings or the head"
    place.config["budgets"]["rounds"] = {**place.config["budgets"]["ilp"], "allocation": {"kind": "ilp", "rounds": 1}}
    one["budgets"] = ["ffn-0.8", "ilp", "rounds"]
    place.config["budgets"]["outer"] = {"targets": ["ffn", "embeddings"], "keep_bytes": 0.2}
    place.config["experiments"]["two"] = {**one, "methods": ["rounded_gram"], "budgets": ["outer"]}
    done = place.run("--quiet", "rules", "host", "reason")
    assert done.returncode == 0, done.stderr
    assert place.planned() == Counter()
    outer = next((tmp_path / "results").glob("pico-*/few-*/rounded_gram-*"))
    assert (outer.parent / "statistics" / "outer" / "manifest.json").is_file()
    rows = json.loads(next(outer.glob("outer-*/allocation.json")).read_text())["groups"]
    assert min(row["predicted"] for row in rows if ".tied" in row["group"]) > 0
    folder = next((tmp_path / "results").glob("pico-*/few-*/whitened-*"))
    assert (folder / "predicted.parquet").is_file()
    own = next(folder.glob("rounds-*"))
    assert (own / "predicted.parquet").is_file()
    records = json.loads((own / "rounds.json").read_text())["rounds"]
    assert [record["round"] for record in records] == [0, 1]
    assert sum(record["chosen"] for record in records) == 1
    for label in ("ilp", "rounds"):
        found = json.loads((next(folder.glob(f"{label}-*")) / "allocation.json").read_text())
        assert found["status"] == "optimal"
        assert found["bound"] <= found["value"] == pytest.approx(found["predicted"])
        assert 0.795 <= found["keep_bytes"] <= 0.8
    place.config["budgets"]["ilp"]["allocation"] = {"kind": "ilp", "gap": 0.001}
    planned = place.planned()
    assert (planned["compress"], planned["predict_losses"], planned["predict_in_rounds"]) == (1, 0, 0)


def test_forms_are_timed_once_for_all_bounds(tmp_path):
    place = Workspace(tmp_path)
    timing = {"tokens": 1, "sizes": 2, "repeats": 6, "threads": 1}
    for name, keep in (("slow", 30.0), ("slower", 40.0)):
        allocation = {"kind": "ilp", "time": {"keep": keep, **timing}}
        place.config["budgets"][name] = {"targets": ["ffn"], "keep_bytes": 0.8, "allocation": allocation}
    place.config["experiments"]["one"] |= {"methods": ["whitened"], "budgets": ["ffn-0.8", "slow", "slower"]}
    planned = place.planned()
    assert (planned["time_forms"], planned["compress"]) == (1, 3)
    done = place.run("--quiet", "rules", "host", "reason")
    assert done.returncode == 0, done.stderr
    (times,) = (tmp_path / "results").glob("pico-*/times/*.json")
    record = json.loads(times.read_text())
    assert {row["size"] for row in record["forms"]} >= {1}
    assert record["protocol"]["dtype"] == "float32", "that of the model"
    assert record["protocol"]["threads"] == record["machine"]["threads"] == 1
    for folder in (tmp_path / "results").glob("pico-*/few-*/whitened-*/slow*"):
        found = json.loads((folder / "allocation.json").read_text())
        assert 0 < found["time"]["keep"] <= found["budget"]["allocation"]["time"]["keep"]
    place.config["budgets"]["slow"]["allocation"] = {"kind": "ilp", "time": {"keep": 31.0, **timing}}
    planned = place.planned()
    assert (planned["time_forms"], planned["compress"]) == (0, 1), "another bound on the same times"


def test_sizes_are_learned_in_a_job_of_their_own(tmp_path):
    place = Workspace(tmp_path)
    learned = {"kind": "learned", "steps": 4, "batch": 1, "every": 2}
    place.config["budgets"]["learned"] = {"targets": ["ffn"], "keep_bytes": 0.6, "allocation": learned}
    one = place.config["experiments"]["one"]
    one |= {"methods": ["whitened"], "budgets": ["ffn-0.8", "learned"]}
    planned = place.planned()
    assert planned["learn_sizes"] == 1, "of the budget that asks for it"
    assert not set(planned) & set(PREDICTING), "equal shares to start from ask for no backward pass over all matrices"
    done = place.run("--quiet", "rules", "host", "reason")
    assert done.returncode == 0, done.stderr
    assert place.planned() == Counter()
    cell = next((tmp_path / "results").glob("pico-*/few-*/whitened-*/learned-*"))
    record, found = (json.loads((cell / f"{name}.json").read_text()) for name in ("learned", "allocation"))
    assert [look["step"] for look in record["looks"]] == [0, 2, 4]
    assert {row["group"]: row["size"] for row in found["groups"]} == record["sizes"]
    assert found["held_out_best"] == record["held_out_best"] <= record["held_out_start"]
    assert 0.595 <= found["keep_bytes"] <= 0.6
    learned["rate"] = 0.2
    planned = place.planned()
    assert (planned["learn_sizes"], planned["compress"], planned["factorize"]) == (1, 1, 0)


def test_structures_are_chosen_and_loaded(tmp_path):
    """Factors of the members are made once for all methods, and again only for what changes."""
    place = Workspace(tmp_path)
    one, members = place.config["experiments"]["one"], [{"kind": "low_rank"}, {"kind": "neuron_slice"}, {"kind": "affine_block"}]
    place.config["methods"]["mixed"] = {"structure": {"kind": "mixed", "members": members}, "metric": {"kind": "gram"}}
    place.config["methods"]["slices"] = {"structure": members[1]}
    one |= {"methods": ["whitened"], "budgets": ["ffn-0.8"]}
    assert place.run("--quiet", "rules", "host", "reason").returncode == 0
    one["methods"] = ["mixed"]
    done = place.run("-n", "--quiet")
    assert (
        "mixed (mixed) chooses between structures by predicted loss, which budget 'ffn-0.8' does not" in done.stdout + done.stderr
    )
    ilp = {"targets": ["ffn", "attention"], "keep_bytes": 0.3}
    place.config["budgets"]["ilp"] = {**ilp, "allocation": {"kind": "ilp"}}
    place.config["budgets"]["rounds"] = {**ilp, "allocation": {"kind": "ilp", "rounds": 1}}
    one["budgets"] = ["ilp", "rounds"]
    planned = place.planned()
    assert planned["factorize"] == 2 * 2, "of two members, in two shards each: the third is a method that was there"
    assert (planned["predict_losses"], planned["predict_in_rounds"], planned["compress"]) == (3, 1, 2)
    done = place.run("--quiet", "rules", "host", "reason")
    assert done.returncode == 0, done.stderr
    assert place.planned() == Counter()
    folder = next((tmp_path / "results").glob("pico-*/few-*"))
    names = {path.name.partition("-")[0] for path in folder.glob("*-*") if (path / "factors").is_dir()}
    assert names == {"whitened", "slices", "mixed.affine_block"}
    for budget in ("ilp", "rounds"):
        cell = next(folder.glob(f"mixed-*/{budget}-*"))
        found = json.loads((cell / "allocation.json").read_text())
        assert found["status"] == "optimal"
        assert 0.295 <= found["keep_bytes"] <= 0.3
        chosen = {row["group"].partition("@")[2] for row in found["groups"] if row["size"] is not None}
        assert chosen > {"low_rank"}, "FFNs are replaced as a whole as well"
        assert logits(load_model(cell / "checkpoint", "float32", "cpu")).isfinite().all()
    members[1]["criterion"] = "activation"
    planned = place.planned()
    assert (planned["factorize"], planned["predict_losses"], planned["compress"]) == (2, 1, 2), "one member, and what reads it"


@pytest.mark.parametrize("study", ["frontier", "ablation", "recovery"])
def test_no_choice_reads_what_is_evaluated(tmp_path, study):
    """Of all jobs that checkpoints come of (allocations, rounds, learned sizes, recoveries) none reads an evaluation's text."""
    for name in ("config", "resources"):
        (tmp_path / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "snakemake", "checkpoints", "-n", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    command += ["--configfile", f"config/studies/{study}.yaml"]
    done = dry_run(command, tmp_path, dict(os.environ))
    assert done.returncode == 0, done.stderr
    inputs = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if line.strip().startswith("input: ")]
    assert any("calibration" in line for line in inputs)
    assert not [line for line in inputs if "evaluation" in line or "validation" in line]
