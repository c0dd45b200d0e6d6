"""Trained models of several families against their known dense loss, and all methods on them through the workflow."""

import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
import yaml

from tests.conftest import ROOT, SHARED
from winnow.checkpoint.loading import load_model
from winnow.data.texts import read_rows
from winnow.data.tokens import encode, evaluation_windows, load_tokenizer
from winnow.evaluation.kinds.perplexity import Perplexity
from winnow.evaluation.perplexity import evaluate, summarize_windows
from winnow.io.artifacts import read_json
from winnow.planning import presets
from winnow.planning.config import Text
from winnow.planning.config_files import default
from winnow.structures.base import STRUCTURES

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="no shared models beside the checkout"),
]
DATA, DEMO, PARTS = SHARED / "data", ROOT / "resources", ("calibration", "evaluation")
P1 = {"files": [str(DATA / "wt2raw-test.txt")], "format": "lines"}
RAW = {"files": [str(DATA / "wt2raw-test.txt")]}
STORIES = {"files": [str(DATA / "tinystories-train-sample.txt")]}
REFERENCES: list[tuple] = [  # model, text, tokens in all, nats per token over 400 windows of 256
    ("stories260K", STORIES, 1_064_553, 2.020298),
    ("wt2-llama", P1, 432_160, 4.258251),
    ("wt2-llama", RAW, 424_913, 3.980124),
    ("wt2-gpt2", P1, 432_160, 5.011800),
    ("wt2-gpt2", RAW, 424_913, 4.811824),
    ("wt2-opt", P1, 432_160, 4.596430),
    ("wt2-opt", RAW, 424_913, 4.361522),
    ("wt2-neox", P1, 432_160, 4.449876),
    ("wt2-neox", RAW, 424_913, 4.163966),
]


@pytest.mark.parametrize(
    ("model", "text", "tokens", "nll"),
    # A text that is read whole, as the stories are, shows no more.
    [pytest.param(*reference, marks=pytest.mark.slow if reference[1] is RAW else ()) for reference in REFERENCES],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_dense_loss_is_the_known_one(model, text, tokens, nll):
    preset = Text(**text)
    whole = preset.join.join(read_rows(preset.model_dump()))
    ids = encode(load_tokenizer(SHARED / "models" / model), whole, special_tokens=False)
    assert len(ids) == tokens
    windows, first = (torch.from_numpy(a) for a in evaluation_windows(ids, "plain", 256, None, 400, None))
    rows = evaluate(load_model(SHARED / "models" / model, "float32", "cpu"), None, windows, first, 16)
    result = summarize_windows(rows, None)
    assert result["tokens"] == 102_000
    assert result["nll"] == pytest.approx(nll, abs=2e-6)


def experiments() -> dict:
    """Every shared model, four methods, four of the default budgets: wt2 models on WikiText-2, stories260K on TinyStories."""
    base = default()
    wt2 = ["wt2-llama", "wt2-gpt2", "wt2-opt", "wt2-neox"]
    stories = {**STORIES, "separator": "<|endoftext|>", "join": "<|endoftext|>"}
    plain = Perplexity.Options(text="x", protocol="plain", length=256, windows=400).model_dump(exclude={"text"})
    common = {"methods": presets.DEMO, "budgets": ["ffn-0.8", "ffn-0.4", "all-0.8", "all-0.4"]}
    few = {"windows": 128, "length": 256, "special_tokens": False}
    return {
        "models": {name: {"source": str(SHARED / "models" / name)} for name in [*wt2, "stories260K"]},
        "texts": {
            "wt2_train": {"files": [str(DATA / "wt2raw-train-excerpt.txt")]},
            "wt2_test": P1,
            "stories_head": {**stories, "stop": 1200},
            "stories_tail": {**stories, "start": 1200},
        },
        "calibrations": {"wt2": {"text": "wt2_train", **few}, "stories": {"text": "stories_tail", **few}},
        "methods": base["methods"],
        "budgets": base["budgets"],
        "evaluations": {"wt2": {"text": "wt2_test", **plain}, "stories": {"text": "stories_head", **plain}},
        "experiments": {
            "wt2": {"models": wt2, "calibrations": ["wt2"], "evaluations": ["wt2"], **common},
            "stories": {"models": ["stories260K"], "calibrations": ["stories"], "evaluations": ["stories"], **common},
        },
    }


def structures() -> dict:
    """Every structure on the demo model and on four families, in the FFN at two byte budgets, with random controls."""
    config, keeps, demo = experiments(), ["ffn-0.8", "ffn-0.5"], default()
    methods = ["svd", "whitened", "kfac", "whitened_gauge_fixed", "grc_whitened", "basis_sharing", "bypass", "by_target"]
    config["methods"]["by_target"] = {"structure": {"kind": "by_target"}, "metric": {"kind": "weights"}}
    methods += ["clusters_cosine", "tiers_activation", "ffsplit_whitened", "ffsplit_affine", "modegpt_mlp"]
    config["budgets"]["ffn-0.5"] = {"targets": ["ffn"], "keep_bytes": 0.5}
    config["budgets"]["ffn-0.5-ilp"] = {"targets": ["ffn"], "keep_bytes": 0.5, "allocation": {"kind": "ilp"}}
    config["budgets"]["whole"] = {"targets": ["ffn"], "rank_fraction": 1.0}  # forms of one size, or of few bytes at every one
    texts = {part: {**demo["texts"][f"demo_{part}"], "files": [str(DEMO / f"texts/demo/{part}.jsonl")]} for part in PARTS}
    config["texts"] |= {f"demo_{part}": text for part, text in texts.items()}
    config["models"] |= {"demo": {"source": str(DEMO / "models" / "demo")}}
    config["calibrations"]["demo"] = demo["calibrations"]["demo"]
    config["evaluations"]["demo"] = demo["evaluations"]["demo"]
    for evaluation in config["evaluations"].values():
        evaluation |= {"windows": 64, "compare": False}
    wt2 = {key: config["experiments"]["wt2"][key] for key in ("models", "calibrations", "evaluations")}
    config["experiments"] = {}
    for name, where in (("wt2", wt2), ("demo", {key: ["demo"] for key in wt2})):
        config["experiments"] |= {
            f"{name}-matrices": {**where, "methods": methods, "budgets": keeps},
            f"{name}-coupled": {**where, "methods": ["coupled", "coupled_one_sided"], "budgets": ["ffn-0.5"]},
            f"{name}-mixed": {**where, "methods": ["mixed"], "budgets": ["ffn-0.5-ilp"]},
            f"{name}-blocks": {**where, "methods": ["r2lin", "rounded_8bit", "rounded_4bit"], "budgets": ["whole"]},
        }
    return config


def run(config: dict, tmp_path, *targets: str) -> tuple[pd.DataFrame, str]:
    """The summary table of a configuration, and its folder. Keep the results with WINNOW_SHARED_RESULTS=<folder>."""
    folder = os.environ.get("WINNOW_SHARED_RESULTS", str(tmp_path))
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/config.yaml", "w") as stream:
        yaml.safe_dump(config, stream)
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "tables",
        "report",
        *targets,
        "--snakefile",
        str(ROOT / "Snakefile"),
        "--directory",
        folder,
    ]
    command += ["--cores", "2", "--replace-workflow-config", "--configfile", f"{folder}/config.yaml"]
    subprocess.run(command, check=True)
    return pd.read_csv(f"{folder}/results/tables/summary.csv"), folder


def check_bytes(row: pd.Series, folder: str) -> None:
    assert read_json(f"{folder}/{row['checkpoint']}/manifest.json")["stored_bytes"] == row["stored_bytes"]
    assert pd.isna(row["keep_requested"]) or abs(row["keep_bytes"] - row["keep_requested"]) <= 0.005


def everywhere() -> dict:
    """Whitened SVD of the FFN and attention matrices at 0.8 of their bytes, on every shared model and the demo: loss, and
    HellaSwag's first 500 rows."""
    config, demo = experiments(), default()
    config["models"] |= {"demo": {"source": str(DEMO / "models" / "demo")}}
    texts = {part: {**demo["texts"][f"demo_{part}"], "files": [str(DEMO / f"texts/demo/{part}.jsonl")]} for part in PARTS}
    config["texts"] |= {f"demo_{part}": text for part, text in texts.items()}
    config["calibrations"]["demo"] = demo["calibrations"]["demo"]
    config["evaluations"]["demo"] = demo["evaluations"]["demo"]
    rows = {"hellaswag": {"validation": [str(DATA / "hellaswag-val.jsonl")]}}
    config["evaluations"]["hellaswag"] = {"kind": "accuracy", "tasks": ["hellaswag"], "files": rows, "limit": 500}
    config["experiments"]["demo"] = {"models": ["demo"], "calibrations": ["demo"], "evaluations": ["demo"]}
    for experiment in config["experiments"].values():
        experiment["evaluations"] = [*experiment["evaluations"], "hellaswag"]
        experiment |= {"methods": ["whitened"], "budgets": ["all-0.8"]}
    return config


@pytest.mark.slow
def test_every_model_at_0_8(tmp_path):
    """About twenty minutes on two cores; prints the table."""
    table, folder = run(everywhere(), tmp_path, "accuracy")
    accuracy = pd.read_csv(f"{folder}/results/tables/accuracy.csv").set_index(["model", "method", "measure"])
    assert set(table["model"]) == {path.name for path in (SHARED / "models").iterdir() if path.is_dir()} | {"demo"}
    lines = []
    for _, row in table.iterrows():
        scores = [accuracy.loc[(row["model"], row["method"], measure)] for measure in ("acc", "acc_norm")]
        assert all(score["documents"] == 500 for score in scores)
        lines.append(
            {
                **{
                    key: row[key]
                    for key in ("model", "method", "perplexity", "nll", "delta_nll", "delta_nll_se", "model_stored_bytes")
                },
                **{name: f"{s['value']:.3f}({s['value_se']:.3f})" for name, s in zip(("acc", "acc_norm"), scores, strict=True)},
            }
        )
        if row["method"] != "dense":
            check_bytes(row, folder)
    print(pd.DataFrame(lines).to_string(index=False, float_format="%.4f"))


@pytest.mark.slow
def test_all_methods_on_all_models(tmp_path):
    """About a quarter of an hour on two cores."""
    table, folder = run(experiments(), tmp_path)
    assert len(table) == 5 * (1 + 4 * 4)
    known = {name: nll for name, text, _, nll in REFERENCES if text is not RAW}
    for _, row in table.iterrows():
        if row["method"] == "dense":
            assert row["nll"] == pytest.approx(known[row["model"]], abs=2e-6)
        else:
            check_bytes(row, folder)


@pytest.mark.slow
def test_every_structure_on_every_family(tmp_path):
    """About an hour on two cores."""
    table, folder = run(structures(), tmp_path)
    compressed = table[table["method"] != "dense"]
    assert set(compressed["structure"]) == set(STRUCTURES)
    for selecting in ("clusters_cosine", "tiers_activation", "ffsplit_whitened", "ffsplit_affine", "modegpt_mlp"):
        assert any(name in set(compressed["method"]) for name in (f"{selecting}.random", selecting.split("_")[0] + "_random"))
    for _, row in compressed.iterrows():
        check_bytes(row, folder)
