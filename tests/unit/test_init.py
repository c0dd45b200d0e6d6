"""`winnow init`: the configuration that it writes for a model, and what it refuses."""

import json
import shutil
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT, pico
from winnow.commands import init as command
from winnow.commands.suggested import texts_of, tokens_of
from winnow.data.texts import read_rows
from winnow.errors import InputError
from winnow.planning.config import Text, load
from winnow.planning.plan import Plan

DEMO = ROOT / "resources" / "models" / "demo"


@pytest.fixture(autouse=True)
def inside(monkeypatch):
    monkeypatch.chdir(ROOT)


def model(folder, family="llama"):
    pico(family).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(DEMO / name, folder / name)
    return str(folder)


def text(path, rows=400):
    path.write_text("".join(f"Row {n} of a text says that {n} times {n} is {n * n}.\n" for n in range(rows)), encoding="utf-8")
    return str(path)


def written(tmp_path, source, texts=(), evaluated=(), keeps=(0.4,), methods=("winnow",), revision=None):
    """(lines that are printed, what the file says)"""
    output = tmp_path / "mine.yaml"
    said = command.init(source, revision, texts, evaluated, keeps, methods, output)
    return said, yaml.safe_load(output.read_text(encoding="utf-8"))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "mixtral"])
def test_what_it_writes_is_a_valid_plan_and_says_how_to_run_it(tmp_path, family):
    source, own = model(tmp_path / "My model!", family), text(tmp_path / "own.txt")
    said, found = written(tmp_path, source, [own], keeps=[0.4, 0.25], methods=["winnow", "svd"])
    plan = Plan(load(found), ROOT)
    assert [*found["models"]] == ["Mymodel"]
    assert {(cell.method, plan.budget_name(cell.budget)) for cell in plan.cells if cell.method} == {
        (method, budget) for method in ("winnow", "svd") for budget in ("all-0.4", "all-0.25")
    }
    assert said[-1].endswith(f"snakemake --replace-workflow-config --configfile {tmp_path / 'mine.yaml'}")
    assert any(line.startswith("Memory: ") for line in said)


def test_one_text_is_split_by_rows_and_windows_fit_into_both_parts(tmp_path):
    source = model(tmp_path / "model")
    _, found = written(tmp_path, source, [text(tmp_path / "own.txt")])
    texts = {name: Text.model_validate(preset).model_dump() for name, preset in found["texts"].items()}
    rows = {name: read_rows(preset) for name, preset in texts.items()}
    assert not {*rows["calibration"]} & {*rows["evaluation"]}
    assert [len(part) for part in rows.values()] == [360, 40]
    calibration, evaluation = found["calibrations"]["mine"], found["evaluations"]["mine"]
    assert calibration["windows"] * calibration["length"] <= tokens_of(found["texts"]["calibration"], source)
    assert 2 <= evaluation["windows"] <= tokens_of(found["texts"]["evaluation"], source) // evaluation["length"]


def test_without_a_text_it_takes_the_demos_and_says_so(tmp_path):
    said, found = written(tmp_path, str(DEMO))
    assert "of the demo's texts (--text gives your own)" in said[0]
    assert found["texts"]["calibration"]["files"] == ["resources/texts/demo/calibration.jsonl"]
    assert found["calibrations"]["mine"] == {"text": "calibration", "windows": 128, "length": 512}
    assert "use text like that of your application" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")


def test_elsewhere_the_line_names_the_snakefile(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, found = written(tmp_path, str(DEMO))
    assert f"--snakefile {ROOT / 'Snakefile'}" in said[-1]
    assert all((tmp_path / file).is_file() for preset in found["texts"].values() for file in preset["files"])


def test_a_model_that_does_not_fit_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "machine", lambda: {"memory": 1e6, "disk": 1e9})
    said, found = written(tmp_path, str(DEMO))
    assert found["models"]["demo"]["load"] == "stream"
    assert "(streamed)" in said[1]


def test_a_model_on_the_hub_is_named_with_its_revision(tmp_path):
    said, found = written(tmp_path, "org/name", revision="0" * 40)
    assert found["models"] == {"name": {"source": "org/name", "revision": "0" * 40, "dtype": "bfloat16"}}
    assert found["calibrations"]["mine"]["precision"] == "float32", "statistics of a model that may be large, by half"
    assert any(line.startswith("Download it:") and "snakemake prefetch" in line for line in said)


def broken(tmp_path, name):
    folder = tmp_path / name
    source = model(folder, "bert" if name == "encoder" else "llama")
    if name == "encoder":
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        content |= {"is_decoder": False, "architectures": ["BertForMaskedLM"]}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    elif name == "config":
        (folder / "config.json").write_text("{", encoding="utf-8")
    elif name == "family":
        content = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"model_type": "nothing"}
        (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    elif name == "weights":
        (folder / "model.safetensors").unlink()
    elif name == "cut":
        (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:20])
    return source


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("config", "config.json"),
        ("family", "'nothing'"),
        ("weights", "no model.safetensors"),
        ("cut", "incomplete or not a safetensors file"),
        ("encoder", "perplexity is the loss of next-token prediction"),
    ],
)
def test_a_broken_directory_is_refused_in_one_line_and_nothing_is_written(tmp_path, name, expected):
    with pytest.raises(InputError, match=expected) as error:
        written(tmp_path, broken(tmp_path, name))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "mine.yaml").exists()


REFUSED = [
    ({"source": "nowhere"}, "nowhere: there is no such model directory"),
    ({"texts": ["nothing.txt"]}, "nothing.txt: there is no such text file"),
    ({"texts": ["few.txt"]}, "few.txt: 3 rows, too few to keep some for evaluation"),
    ({"evaluated": ["few.txt"]}, "--eval-text: is given without --text"),
    ({"keeps": [1.4]}, "budgets.all-1.4.keep_bytes"),
    ({"methods": ["winow"]}, "there is no 'winow'; did you mean 'winnow'"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=[expected[:24] for _, expected in REFUSED])
def test_mistakes_are_one_line_and_nothing_is_written(tmp_path, options, expected):
    text(tmp_path / "few.txt", rows=3)
    given = {
        key: [str(tmp_path / v) if str(v).endswith("few.txt") else v for v in value]
        for key, value in options.items()
        if key != "source"
    }
    with pytest.raises(InputError, match=expected):
        written(tmp_path, options.get("source", str(DEMO)), **given)
    assert not (tmp_path / "mine.yaml").exists()


def test_a_file_is_never_written_over(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine", encoding="utf-8")
    with pytest.raises(InputError, match="exists already"):
        written(tmp_path, str(DEMO))
    assert (tmp_path / "mine.yaml").read_text(encoding="utf-8") == "mine"


def test_a_text_of_objects_needs_no_format(tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text("".join(json.dumps({"text": f"Row {n}"}) + "\n" for n in range(30)), encoding="utf-8")
    calibration, evaluation = texts_of([str(path)], [], ROOT)
    assert calibration == {"files": [str(path)], "stop": 27}
    assert evaluation == {"files": [str(path)], "start": 27}


def test_the_command_prints_what_it_wrote(tmp_path):
    output = tmp_path / "mine.yaml"
    done = subprocess.run(
        [sys.executable, "-m", "winnow", "init", str(DEMO), "--output", str(output)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{output}: LlamaForCausalLM, 6 layers, 1.2 million numbers")
    assert output.is_file()
