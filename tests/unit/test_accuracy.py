"""Tasks of lm-eval: the command line's numbers, local data, what a job reads, and pairing with the dense model."""

import json
import os
import shutil
import socket
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import lm_eval.evaluator
import lm_eval.tasks
import pytest
import torch
from lm_eval.__main__ import cli_evaluate

from tests.conftest import ROOT, pico
from tests.pages import documented
from tests.unit.test_checkpoint import build
from tests.unit.test_tokens import words
from winnow.__main__ import main
from winnow.checkpoint.loading import load_model
from winnow.data.task_files import files_of
from winnow.data.tasks import check_documents, documents_of, load_tasks, stay_offline
from winnow.data.tokens import load_tokenizer
from winnow.errors import InputError
from winnow.evaluation.accuracy import Harness, against, score
from winnow.evaluation.accuracy_table import COLUMNS, accuracy_table
from winnow.evaluation.kinds.accuracy import Accuracy

DEMO = ROOT / "resources" / "models" / "demo"
ENDINGS = ["returns a list of strings.", "is a purple giraffe.", "raises ValueError if the file is closed.", "swims home"]
DEFINITION = """
include: shared.yaml
task: calls
dataset_kwargs: {data_files: {validation: %s}}
process_docs: !function asks.process
"""
SHARED = """
dataset_path: json
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{query}}"
doc_to_target: "{{label}}"
doc_to_choice: "choices"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
CODE = """
def process(rows):
    return rows.map(lambda row: {"query": "Note: " + row["ctx"], "choices": row["endings"]})
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a task of 24 made-up questions, whose definition includes another file and names code."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {"activity_label": f"Call {i}", "ctx": f"The function f{i} of the module", "label": i % 4, "endings": turned(i)}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "calls.yaml").write_text(DEFINITION % (folder / "rows.jsonl"))
    (folder / "shared.yaml").write_text(SHARED)
    (folder / "asks.py").write_text(CODE)
    return folder


def turned(i: int) -> list[str]:
    return ENDINGS[i % 3 :] + ENDINGS[: i % 3]


def spec(**options) -> dict:
    return Accuracy.Options(kind="accuracy", **options).model_dump()


def scores_of(model, world, batch=4, **options):
    preset = spec(tasks=[str(world / "calls.yaml")], **options)
    return score(model, load_tokenizer(DEMO), load_tasks(preset), preset["num_fewshot"], preset["limit"], batch)


@pytest.fixture(scope="module")
def dense_scores(world):
    return scores_of(load_model(DEMO, "float32", "cpu"), world)


def test_the_dense_demo_model_scores_what_the_command_line_prints(world, dense_scores, tmp_path, monkeypatch):
    """Its entry point in this process, spared the reading of all its own definitions and of the machine's description;
    tests/shared runs the program itself."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    arguments = ["lm_eval", "--model", "hf", "--model_args", f"pretrained={DEMO},dtype=float32", "--tasks", "calls"]
    arguments += ["--include_path", str(world), "--device", "cpu", "--output_path", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    cli_evaluate()
    (printed,) = tmp_path.rglob("results_*.json")
    expected = json.loads(printed.read_text())["results"]["calls"]
    ours = dense_scores["calls"]
    assert set(ours) == {"acc", "acc_norm"}
    for name, one in ours.items():
        assert one["value"] == pytest.approx(expected[f"{name},none"], abs=1e-4)
        assert one["value_se"] == pytest.approx(expected[f"{name}_stderr,none"], abs=1e-4)
        assert len(one["per_document"]) == 24
        assert 0 < sum(one["per_document"]) < 24, "a task that the model has all of, or nothing, tells no difference"


@pytest.fixture
def checkpoint(tmp_path):
    """A compressed random model with the demo's tokenizer."""
    pico("llama").save_pretrained(tmp_path / "model")
    for file in DEMO.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "model")
    return build(tmp_path / "model", tmp_path / "work", ["ffn", "attention"], 0.6, "shared_basis")


def options_for(checkpoint, world, out):
    options = ["--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32", "--tasks", "calls"]
    return [*options, "--include_path", str(world), "--device", "cpu", "--output_path", str(out)]


def printed(out):
    (file,) = out.rglob("results_*.json")
    return json.loads(file.read_text())["results"]["calls"]


def test_the_command_line_of_lm_eval_reads_a_checkpoint(checkpoint, world, tmp_path, monkeypatch):
    """`python -m winnow lm-eval` in this process, spared what the test before spares; the program itself is run below."""
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", partial(lm_eval.tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _: None)
    arguments = ["winnow", "lm-eval", *options_for(checkpoint, world, tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    main()
    found = printed(tmp_path / "out")
    ours = scores_of(load_model(checkpoint, "float32", "cpu"), world)["calls"]
    for name, one in ours.items():
        assert one["value"] == pytest.approx(found[f"{name},none"], abs=1e-9)
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "lm_eval.__main__")
    with pytest.raises(
        SystemExit, match=r"winnow: lm-eval: needs lm_eval, which is not installed; .*`pip install '\.\[workflow\]'`"
    ):
        main()


@pytest.mark.slow
def test_the_command_of_the_documentation_in_a_process_of_its_own(checkpoint, world, tmp_path):
    """Where the program itself says that it does not know the format."""
    (line,) = documented("winnow lm-eval ")
    for placeholder, own in {"<checkpoint>": str(checkpoint), "my_task": "calls", "data/tasks": str(world)}.items():
        line = line.replace(placeholder, own)
    options = [*line.split()[2:], "--limit", "4", "--device", "cpu", "--output_path", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    plain = subprocess.run([sys.executable, "-m", "lm_eval", *options], capture_output=True, text=True, env=env)
    assert plain.returncode != 0
    assert "Unknown quantization type, got winnow" in plain.stderr
    done = subprocess.run([sys.executable, "-m", "winnow", "lm-eval", *options], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout
    assert printed(tmp_path / "out")["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


def test_the_batch_changes_no_score_and_the_limit_takes_the_first_documents(world, dense_scores):
    model = load_model(DEMO, "float32", "cpu")
    assert scores_of(model, world, batch=1) == dense_scores
    few = scores_of(model, world, batch=7, limit=10)
    for name, one in few["calls"].items():
        assert one["per_document"] == dense_scores["calls"][name]["per_document"][:10]


def test_a_model_that_overflows_stops_the_job(world):
    model = load_model(DEMO, "float32", "cpu")
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="logits are not finite for the request that begins 'Note: The function"):
        scores_of(model, world, limit=2)


@pytest.mark.parametrize("kind", ["low_rank", "shared_basis", "coupled"])
def test_the_harness_leaves_a_compressed_model_as_it_is(saved_llama, tmp_path, kind):
    model = load_model(build(saved_llama, tmp_path / "work", ["ffn"], 0.6, kind), "float32", "cpu")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = model(input_ids=ids).logits
        lm = Harness(pretrained=model, tokenizer=load_tokenizer(DEMO), batch_size=2)
        assert torch.equal(lm._model_call(ids), before)
    assert lm.tok_encode("a call") == load_tokenizer(DEMO)("a call").input_ids


def test_requests_that_the_tokenizer_does_not_know_stop_the_job(world, tmp_path):
    model, tokenizer = load_model(DEMO, "float32", "cpu"), words(tmp_path, bos_token="[CLS]", eos_token="[SEP]")
    preset = spec(tasks=[str(world / "calls.yaml")], limit=2)
    with pytest.raises(InputError, match=r"\d+ of \d+ tokens of the text are unknown to the tokenizer \(\[UNK\]\)"):
        score(model, tokenizer, load_tasks(preset), None, 2, 4)
    asked = [SimpleNamespace(args=(text, {})) for text in ("a function of some module", "another of them")]
    with pytest.raises(InputError, match=r"8 of \d+ tokens of the text are unknown"):
        Harness(pretrained=model, tokenizer=tokenizer, batch_size=2).generate_until(asked)
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(InputError, match="the tokenizer has neither a BOS nor an EOS token, which lm-eval puts before a text"):
        score(model, tokenizer, load_tasks(preset), None, 2, 4)


def test_every_file_of_a_definition_is_an_input(world):
    def names(**options):
        return {os.path.basename(p) for p in files_of("e", Accuracy.Options(kind="accuracy", **options))}

    everything = {"calls.yaml", "shared.yaml", "asks.py", "rows.jsonl"}
    assert names(tasks=[str(world / "calls.yaml")]) == everything
    assert names(tasks=["calls"], include_path=str(world)) == everything
    assert names(tasks=["hellaswag"], files={"hellaswag": {"validation": [str(world / "rows.jsonl")]}}) == {"rows.jsonl"}
    assert names(tasks=["hellaswag"]) == set()
    for options in (
        {"tasks": ["gone.yaml"]},
        {"tasks": ["x"], "include_path": "gone"},
        {"tasks": ["hellaswag"], "files": {"hellaswag": {"validation": ["gone.json"]}}},
    ):
        with pytest.raises(InputError, match=r"evaluations\.e.*: gone.*: there is no such"):
            names(**options)


def test_definitions_that_cannot_be_read_are_named(tmp_path):
    def refused(text: str) -> str:
        (tmp_path / "own.yaml").write_text(text)
        with pytest.raises(InputError) as caught:
            files_of("e", Accuracy.Options(kind="accuracy", tasks=[str(tmp_path / "own.yaml")]))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    assert refused("task: one\noutput_type: multiple_choice\ntask: two\n") == (
        "own.yaml, line 3: task is already given in line 1; keep one of them"
    )
    assert refused("metadata: {version: 1, version: 2}\n").startswith(
        "own.yaml, line 1: metadata.version is already given in line 1"
    )
    assert refused("task: [one\n").startswith("own.yaml, line 2: not YAML: ")
    assert refused("include: own.yaml\n").endswith("own.yaml: includes itself")
    assert refused("task: " + "[" * 2000) == "own.yaml: nested too deep to be read"
    with pytest.raises(InputError, match=r"evaluations\.e.*n{260}\.yaml: there is no such file"):
        files_of("e", Accuracy.Options(kind="accuracy", tasks=["n" * 260 + ".yaml"]))


def test_hellaswag_reads_local_rows_of_both_forms_with_the_prompt_of_lm_eval(world, tmp_path):
    both = tmp_path / "parts.jsonl"
    row = {"activity_label": "Roof", "ctx_a": "A man sits.", "ctx_b": "he", "endings": [" falls [x] off."] * 4, "label": "2"}
    both.write_text(json.dumps(row) + "\n")
    for file, question in ((world / "rows.jsonl", "Call 0: The function f0 of the module"), (both, "Roof: A man sits. He")):
        preset = spec(tasks=["hellaswag"], files={"hellaswag": {"validation": [str(file)]}})
        task = load_tasks(preset)["hellaswag"]
        assert task.eval_docs[0]["query"] == question
    assert task.eval_docs[0]["choices"][0] == "falls off."
    assert task.doc_to_target(task.eval_docs[0]) in (2, "2")


def refused(**options) -> str:
    with pytest.raises(InputError) as caught:
        load_tasks(spec(**options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_tasks_that_cannot_be_loaded_are_named(world, tmp_path):
    rows = str(world / "rows.jsonl")
    assert "has no split 'valid'; its splits are train, validation" in refused(
        tasks=["hellaswag"], files={"hellaswag": {"valid": [rows]}}
    )
    assert "is evaluated on 'validation'" in refused(tasks=["hellaswag"], files={"hellaswag": {"train": [rows]}})
    (tmp_path / "bad.jsonl").write_text('{"activity_label": "a", "endings": ["x", "y"], "label": 0}\n')
    files = {"hellaswag": {"validation": [str(tmp_path / "bad.jsonl")]}}
    assert "cannot load the task 'hellaswag': KeyError: 'ctx'" in refused(tasks=["hellaswag"], files=files)
    (tmp_path / "cut.jsonl").write_text('{"activity_label": \n')
    files = {"hellaswag": {"validation": [str(tmp_path / "cut.jsonl")]}}
    assert "cannot load the task 'hellaswag': " in refused(tasks=["hellaswag"], files=files)
    assert "duplicate task 'calls'" in refused(tasks=["calls", str(world / "calls.yaml")], include_path=str(world))
    with pytest.raises(ValueError, match="`files` has 'other', which is not in `tasks`"):
        spec(tasks=["hellaswag"], files={"other": {"test": [rows]}})
    with pytest.raises(ValueError, match="must end in one of"):
        spec(tasks=["hellaswag"], files={"hellaswag": {"test": ["rows.txt"]}})


def test_an_evaluation_asks_no_network(world, monkeypatch):
    import datasets.config
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    asked: list = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    stay_offline()
    scores_of(load_model(DEMO, "float32", "cpu"), world, limit=2)
    (world / "hub.yaml").write_text(SHARED.replace("dataset_path: json", "dataset_path: some/where\ntask: hub"))
    assert "cannot load the task" in refused(tasks=[str(world / "hub.yaml")])
    assert asked == []


def test_documents_that_changed_since_they_were_retrieved_are_refused(world):
    tasks = load_tasks(spec(tasks=["calls"], include_path=str(world)))
    facts = {name: documents_of(task, 10) for name, task in tasks.items()}
    assert facts["calls"]["documents"] == 10
    check_documents(tasks, facts, 10)
    with pytest.raises(InputError, match="the documents of the task 'calls' differ from the retrieved ones"):
        check_documents(tasks, facts, 11)


def test_differences_to_the_dense_model_are_paired_by_document():
    one = {"t": {"acc": {"value": 0.5, "value_se": 0.2, "per_document": [1.0, 0.0, 1.0, 0.0]}}}
    dense = {"t": {"acc": {"value": 0.75, "value_se": 0.2, "per_document": [1.0, 0.0, 1.0, 1.0]}}}
    found = against(one, dense)["t"]["acc"]
    assert found["delta"] == -0.25
    assert found["delta_se"] == pytest.approx(0.25)  # sample deviation 0.5 over the root of 4; unpaired it would be 0.38
    dense["t"]["acc"]["per_document"].pop()
    with pytest.raises(InputError, match="t, acc: the dense model has other documents"):
        against(one, dense)


def test_the_table_has_a_row_per_task_and_measure():
    measure = {"value": 0.5, "value_se": 0.1, "per_document": [1.0, 0.0]}
    bytes_ = {"dense_bytes": 10, "stored_bytes": 8, "model_dense_bytes": 20, "model_stored_bytes": 18, "checkpoint": "c"}
    result = {"tasks": {"t": {"documents": 2}}, "scores": {"t": {"acc": measure, "f1": {**measure, "value_se": None}}}, **bytes_}
    row = dict.fromkeys(COLUMNS[:9], "x") | {"keep_requested": None, "targets": "ffn", "result": "r"}
    table = accuracy_table([{**row, "method": "dense", "recovery": "none"}, row], {"r": result})
    assert list(table.columns) == COLUMNS
    assert table["measure"].tolist() == ["acc", "f1"] * 2
    assert table["delta"].tolist()[:2] == [0.0, 0.0]
    assert table["keep_bytes"].tolist() == [0.8] * 4
    assert table["value_se"].isna().tolist() == [False, True] * 2
