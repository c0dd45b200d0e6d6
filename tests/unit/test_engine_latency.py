"""Times in a serving engine: processes that are asked in turns, by engines that this test makes."""

import stat
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from winnow.errors import InputError
from winnow.evaluation.engine_latency import engine_latency
from winnow.evaluation.kinds.latency import Latency

SPEC = {"batches": [1, 2], "prompts": [4, 8], "decode": 3, "repeats": 6, "warm_up": 1, "dtype": "float32", "engine": "vllm"}
VLLM = """
import time
__version__ = "0.0.test"
now = [0.0]
time.perf_counter = lambda: now[0]

class SamplingParams:
    def __init__(self, max_tokens, **options):
        self.max_tokens = max_tokens

class LLM:
    def __init__(self, model, max_model_len, **options):
        print("a line of the engine's own")
        self.cost = float(open(model + "/cost").read())
        self.length = max_model_len

    def generate(self, prompts, options, use_tqdm):
        for prompt in prompts:
            assert len(prompt["prompt_token_ids"]) + options.max_tokens <= self.length
        now[0] += self.cost * (2 + options.max_tokens)
"""


@pytest.fixture
def python(tmp_path) -> str:
    """An interpreter of an environment with an engine whose clock moves by what the file `cost` of a model says."""
    (tmp_path / "vllm.py").write_text(VLLM)
    script = tmp_path / "python"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{tmp_path}" exec "{sys.executable}" "$@"\n')
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return str(script)


def directory(path: Path, cost: float | str) -> Path:
    path.mkdir()
    (path / "cost").write_text(str(cost))
    return path


def test_both_models_are_asked_in_turns(tmp_path, python):
    dense, slow = directory(tmp_path / "dense", 0.002), directory(tmp_path / "slow", 0.02)
    found = engine_latency(dense, slow, {**SPEC, "python": python}, 100, tmp_path)
    assert found["machine"]["engine"].startswith("vllm 0.0.test")
    assert found["machine"]["bandwidth"] > 1e6
    cases = {(case["phase"], case["batch"], case["prompt"]): case for case in found["cases"]}
    assert len(cases) == 8
    for (phase, batch, prompt), case in cases.items():
        own = case["compressed"]
        assert own["verdict"] == "slower than dense"
        assert own["ratio"]["median"] == pytest.approx(10)
        assert own["resident_bytes"] > 1e6
        assert len(own["per_repeat"]) == len(case["control"]["per_repeat"]) == 6
        passes, tokens = (3, batch * prompt) if phase == "prefill" else (1, batch)
        assert own["seconds"]["median"] == pytest.approx(0.02 * passes)
        assert own["tokens_per_second"] == pytest.approx(tokens / own["seconds"]["median"])
    assert not list(tmp_path.glob("tmp*")), "exports and logs are removed"


def test_the_dense_model_alone(tmp_path, python):
    spec = {**SPEC, "python": python, "batches": [1], "prompts": [4]}
    (prefill, decode) = engine_latency(directory(tmp_path / "dense", 0.001), None, spec, 100, tmp_path)["cases"]
    assert (prefill["phase"], decode["phase"]) == ("prefill", "decode")
    assert "compressed" not in prefill


def test_an_engine_that_stops_says_why_in_one_line(tmp_path, python):
    with pytest.raises(
        InputError, match=r"vllm stopped \(exit code 1\): .*ValueError: could not convert string to float: 'heavy'"
    ):
        engine_latency(directory(tmp_path / "dense", "heavy"), None, {**SPEC, "python": python}, 100, tmp_path)
    (tmp_path / "vllm.py").unlink()
    with pytest.raises(InputError, match=r"vllm stopped .*No module named 'vllm'"):
        engine_latency(tmp_path / "dense", None, {**SPEC, "python": python}, 100, tmp_path)


def test_no_such_interpreter(tmp_path):
    with pytest.raises(
        InputError, match="python: /nowhere/python: No such file or directory; name the interpreter that has vllm"
    ):
        engine_latency(directory(tmp_path / "dense", 1), None, {**SPEC, "python": "/nowhere/python"}, 100, tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "vllm"}, "engine vllm: python, the path of an interpreter, is missing"),
        ({"python": "/usr/bin/python"}, "engine transformers: remove python"),
        ({"engine": "llama.cpp", "python": "p"}, r"engine llama.cpp: it decodes one sequence; set batches: \[1\]"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValidationError, match=message):
        Latency.Options(kind="latency", **options)
    Latency.Options(kind="latency", engine="llama.cpp", python="p", batches=[1])
