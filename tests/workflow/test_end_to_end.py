"""The real workflow on a random model in a folder of its own: runs, reruns exactly, and refuses bad input."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT, pico
from tests.dry_runs import dry_run
from winnow.checkpoint.measured import METRICS
from winnow.checkpoint.share import measured_beside, share

pytestmark = pytest.mark.workflow
DEMO = ROOT / "resources"
KEEPS = (0.8, 0.5)


def configuration(folder: Path) -> dict:
    texts = {part: str(DEMO / "texts" / "demo" / f"{part}.jsonl") for part in ("calibration", "evaluation")}
    return {
        "models": {"pico": {"source": str(folder / "model"), "shards": 2}},
        "texts": {part: {"files": [path], "format": "jsonl", "stop": 12} for part, path in texts.items()},
        "calibrations": {"few": {"text": "calibration", "windows": 8, "length": 32}},
        "methods": {
            "svd": {"structure": {"kind": "low_rank"}, "metric": {"kind": "weights"}},
            "whitened": {"structure": {"kind": "low_rank"}, "metric": {"kind": "gram"}},
        },
        "budgets": {f"ffn-{keep}": {"targets": ["ffn"], "keep_bytes": keep} for keep in KEEPS},
        "evaluations": {"short": {"text": "evaluation", "protocol": "p1", "length": 32, "windows": 10}},
        "experiments": {
            "one": {
                "models": ["pico"],
                "calibrations": ["few"],
                "methods": ["svd", "whitened"],
                "budgets": [f"ffn-{keep}" for keep in KEEPS],
                "evaluations": ["short"],
            }
        },
    }


class Workspace:
    """A folder with a model and a configuration; Snakemake runs in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = configuration(folder)
        pico("llama").save_pretrained(folder / "model")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(DEMO / "models" / "demo" / name, folder / "model" / name)

    def run(self, *arguments: str) -> subprocess.CompletedProcess:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config))
        command = [sys.executable, "-m", "snakemake", *arguments, "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
        command += [
            "--directory",
            str(self.folder),
            "--replace-workflow-config",
            "--configfile",
            str(self.folder / "config.yaml"),
        ]
        if "-n" in arguments:
            return dry_run(command, self.folder, self.environment())
        return subprocess.run(command, capture_output=True, text=True, cwd=self.folder, env=self.environment(), timeout=500)

    @staticmethod
    def environment() -> dict[str, str]:
        return {**os.environ, "HF_HUB_OFFLINE": "1"}

    def planned(self, *arguments: str) -> Counter:
        """{rule: jobs} that a run would do now."""
        done = self.run("-n", *arguments)
        assert done.returncode == 0, done.stderr
        output = done.stdout + done.stderr
        if "Nothing to be done" in output:
            return Counter()
        table = output.split("Job stats:")[1].split("total")[0].splitlines()[3:]
        return Counter({line.split()[0]: int(line.split()[1]) for line in table if line.strip()})


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("workflow"))
    done = workspace.run()
    assert done.returncode == 0, done.stdout + done.stderr
    workspace.output = done.stdout + done.stderr  # type: ignore[attr-defined]
    return workspace


def test_the_run_ends_with_table_figures_and_report(finished):
    table = pd.read_csv(finished.folder / "results" / "tables" / "summary.csv")
    assert len(table) == 1 + 2 * len(KEEPS)
    assert table["nll"].notna().all()
    for _, row in table[table["method"] != "dense"].iterrows():
        assert abs(row["keep_bytes"] - row["keep_requested"]) <= 0.005
        folder = finished.folder / row["checkpoint"]
        layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
        sizes = {name: tensor.nbytes for name, tensor in load_file(folder / "model.safetensors").items()}
        assert row["model_stored_bytes"] == sum(sizes.values())
        assert row["stored_bytes"] == sum(n for name, n in sizes.items() if name.rsplit(".", 2)[0] in layers)
    for name in ("figures/frontier.svg", "figures/frontier.png", "figures/effective_rank.svg", "report.html"):
        assert (finished.folder / "results" / name).stat().st_size > 1000
    assert "Report: results/report.html" in finished.output


def test_the_report_links_to_what_it_tells_of_and_names_no_place(finished):
    results = finished.folder / "results"
    page = (results / "report.html").read_text()
    links = [link for link in re.findall(r'(?<!:)href="([^"]+)"', page) if not link.startswith("#")]
    for link in links:
        assert (results / link).exists(), link
    table = pd.read_csv(results / "tables" / "summary.csv")
    for folder in table[table["method"] != "dense"]["checkpoint"]:
        at = folder.removeprefix("results/")
        card = at.replace("/checkpoint", "/none-")
        assert {f"{at}/", f"{at}/recipe.yaml"} <= set(links)
        assert any(link.startswith(card) and link.endswith("/README.md") for link in links)
    assert str(finished.folder) not in page.rpartition("<!-- ")[0]
    times = re.findall(r'<td class="time">(.*?)</td>', page)
    assert times
    assert all(time.endswith(" s") for time in times), "all jobs of a run have a record"


FEW = "ffn_hidden: 256 calibration tokens for 96 channels, whose second moment is a rough estimate: fits lose more on "
FEW += "other text than on this; use 48 windows instead of 8 (16 tokens per channel)"


def test_too_few_calibration_tokens_are_told_of_in_log_and_report(finished):
    results = finished.folder / "results"
    (log,) = (results / "logs" / "collect_statistics").rglob("*.log")
    assert FEW in log.read_text()
    (label,) = (path.name for path in results.glob("pico-*/few-*"))
    report = (results / "report.html").read_text()
    assert f"{label}: {FEW}.</li>" in report
    assert "attention_input, attention_output, ffn_input: 256 calibration tokens for 64 channels" in report


def test_artefacts_carry_their_provenance(finished):
    results = finished.folder / "results"
    for path in [
        *results.glob("pico-*/*/*/*/none-*/*.json"),
        *results.glob("pico-*/model.json"),
        *results.glob("**/manifest.json"),
    ]:
        provenance = json.loads(path.read_text())["provenance"]
        assert provenance["params"]["code"], path
        assert provenance["params"]["versions"], path
    for path in results.glob("**/*.safetensors"):
        if "checkpoint" not in path.parts:
            with safe_open(path, framework="pt") as stream:
                assert "code" in stream.metadata()["winnow"], path


def test_what_is_handed_on_names_no_place(finished, tmp_path):
    """The model and the texts of this run have absolute paths; a card has their names, and so has all of a shared folder."""
    place = str(finished.folder)
    cards = sorted((finished.folder / "results").glob("pico-*/few-*/*/*/none-*/README.md"))
    assert len(cards) == 2 * len(KEEPS)
    checkpoint = next((finished.folder / "results").glob("pico-*/few-*/svd-*/ffn-0.5-*/checkpoint"))
    share(checkpoint, tmp_path / "shared", measured_beside(checkpoint))
    own = [checkpoint / name for name in ("README.md", "recipe.yaml", "config.json")]
    for path in [*cards, *own, *(tmp_path / "shared").iterdir()]:
        assert place.encode() not in path.read_bytes(), path
        assert str(DEMO).encode() not in path.read_bytes(), path
    for path in (cards[0], own[0], tmp_path / "shared" / "README.md"):
        assert "| model | `model` |" in path.read_text()
        assert "| calibration text | calibration: calibration.jsonl |" in path.read_text()
    for path, result in ((card, next(card.parent.glob("short-*.json"))) for card in cards):
        numbers = json.loads(result.read_text())
        found = ModelCard.load(path).data.eval_results
        assert {r.metric_type: r.metric_value for r in found} == {kind: numbers[key] for key, (kind, _) in METRICS.items()}
        assert {(r.dataset_type, r.dataset_name) for r in found} == {("evaluation", "evaluation")}
    beside = next(path for path in cards if checkpoint.parent in path.parents)
    shared = ModelCard.load(tmp_path / "shared" / "README.md")
    assert shared.data.eval_results == ModelCard.load(beside).data.eval_results


def test_nothing_is_planned_again(finished):
    assert finished.planned() == Counter()


def test_changing_one_budget_plans_its_cells_only(finished):
    finished.config["budgets"]["ffn-0.5"]["keep_bytes"] = 0.6
    cells = {"compress": 2, "evaluate_perplexity": 2}
    aggregation = {"cards": 1, "tables": 1, "figures": 1, "report": 1, "all": 1}
    assert finished.planned() == Counter({**cells, **aggregation})
    finished.config["budgets"]["ffn-0.5"]["keep_bytes"] = 0.5
    assert finished.planned() == Counter()


def test_touched_files_plan_nothing(finished):
    touched = [*(finished.folder / "model").iterdir(), *(p for p in (finished.folder / "results").rglob("*") if p.is_file())]
    for path in [*touched, *(ROOT / "scripts").glob("*.py"), *(ROOT / "src").rglob("*.py"), ROOT / "Snakefile"]:
        os.utime(path)
    assert finished.planned() == Counter()


def test_the_plan_is_printed_before_any_job_and_refuses_what_cannot_fit(finished, workspace):
    done = workspace.run("plan", "--config", "memory_gb=0.1")
    assert "5 cells, 27 jobs to run" in done.stdout
    assert f"pico, calibration few: {FEW}\n" in done.stdout
    assert not list(workspace.folder.glob("results/pico-*")), "nothing was computed"
    (line,) = {row for row in done.stderr.splitlines() if row.startswith("winnow")}
    assert "GB of memory, there are 0.1 GB" in line
    done = finished.run("plan", "--config", "memory_gb=0.1")
    assert done.returncode == 0, "all is cached, so nothing needs memory"
    assert "0 jobs to run" in done.stdout
    assert "earlier jobs" in done.stdout


def test_a_changed_method_option_plans_that_method(finished):
    finished.config["methods"]["svd"]["metric"] = {"kind": "weight_norm"}
    cells = {"factorize": 2, "measure_spectra": 1, "compress": 2, "evaluate_perplexity": 2}
    assert finished.planned() == Counter({**cells, "cards": 1, "tables": 1, "figures": 1, "report": 1, "all": 1})
    finished.config["methods"]["svd"]["metric"] = {"kind": "weights"}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def refused(workspace: Workspace, *arguments: str) -> str:
    """The one line of a run that must fail; no result may be left half-written."""
    done = workspace.run(*arguments)
    output = done.stdout + done.stderr
    assert done.returncode != 0, output
    lines = [line for line in done.stderr.splitlines() if line.startswith("winnow: ")]
    assert len(set(lines)) == 1, output  # jobs that run side by side may find the same
    assert "Traceback" not in output
    results = workspace.folder / "results"
    assert not list(results.rglob("*.partial-*"))
    assert not list(results.rglob("summary.csv"))
    for folder in {p.parent for p in results.rglob("*.safetensors")} - set(results.glob("*/tokens")):
        assert (folder / "manifest.json").is_file(), folder
    return lines[0]


def test_bad_input_that_is_seen_before_any_job(workspace):
    workspace.config["budgets"]["ffn-0.5"]["keep_byts"] = 0.4
    line = refused(workspace)
    assert "budgets.ffn-0.5.keep_byts: unknown key; did you mean 'keep_bytes'?" in line
    assert str(workspace.folder / "config.yaml") in line
    workspace.config = configuration(workspace.folder)
    workspace.config["models"]["pico"]["source"] = "nowhere"
    assert "nowhere: there is no such model directory" in refused(workspace)
    workspace.config = configuration(workspace.folder)
    weights = workspace.folder / "model" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    assert "pytorch_model.bin is a pickle file" in refused(workspace)
    assert not (workspace.folder / "results").exists()


def test_bad_input_that_a_job_finds(workspace):
    workspace.config["evaluations"]["short"]["windows"] = 10**6
    assert "but 1000000 are needed" in refused(workspace, "tokens")
    workspace.config = configuration(workspace.folder)
    weights = workspace.folder / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    save_file(tensors, weights, metadata={"format": "pt"})
    line = refused(workspace, "--until=retrieve_model")
    assert "model.layers.1.mlp.down_proj.weight has 1 values that are not finite" in line


@pytest.mark.slow
def test_bad_input_that_later_jobs_find(workspace):
    """The tests of texts, tokens and allocation have the same lines."""
    workspace.config["calibrations"]["few"]["windows"] = 10**6
    assert "but 1000000 are requested" in refused(workspace, "--until=tokenize")
    workspace.config = configuration(workspace.folder)
    both = workspace.config["texts"]
    both["calibration"] = {**both["evaluation"], "start": 2}
    assert "overlap" in refused(workspace, "--until=check_overlap")
    workspace.config = configuration(workspace.folder)
    workspace.config["budgets"]["ffn-0.5"] = {"targets": ["ffn"], "rank": 60}
    assert "its break-even rank, 38" in refused(workspace, "--until=compress")
