"""A GGUF file as a model's source in a whole run: read once, and made again by its content alone."""

import json
import os
from collections import Counter

import pandas as pd
import pytest

from tests.unit.gguf_files import write_gguf
from tests.workflow.test_end_to_end import Workspace

pytestmark = pytest.mark.workflow


def test_a_file_is_dequantised_once_compressed_and_measured(tmp_path):
    place = Workspace(tmp_path)
    file = tmp_path / "mine.gguf"
    write_gguf(file, kind="Q8_0")
    place.config["models"]["pico"]["source"] = "mine.gguf"
    place.config["experiments"]["one"] |= {"methods": ["whitened"], "budgets": ["ffn-0.8"]}
    assert place.planned()["dequantize"] == 1
    done = place.run()
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (tmp_path / "results").glob("*/dequantized/gguf.json")
    assert json.loads(made.read_text())["type"] == "Q8_0"
    rows = pd.read_csv(tmp_path / "results" / "tables" / "summary.csv")
    assert list(rows["method"]) == ["dense", "whitened"]
    card = (tmp_path / rows["checkpoint"][1] / "README.md").read_text()
    assert "| dense model | dequantised once from Q8_0 (5 tensors F32, 15 tensors Q8_0) to bfloat16" in card
    planned = place.run("plan")
    assert planned.returncode == 0, planned.stderr
    assert "dequantize" in planned.stdout
    os.utime(file)  # another time, the same content
    assert place.planned() == Counter()
    write_gguf(file, kind="Q8_0", seed=1)
    again = place.planned()
    assert (again["dequantize"], again["retrieve_model"], again["compress"]) == (1, 1, 1)


def test_a_file_that_was_cut_stops_the_run_in_one_line(tmp_path):
    place = Workspace(tmp_path)
    write_gguf(tmp_path / "mine.gguf")
    (tmp_path / "mine.gguf").write_bytes((tmp_path / "mine.gguf").read_bytes()[:-5000])
    place.config["models"]["pico"]["source"] = "mine.gguf"
    done = place.run("--until", "retrieve_model")
    assert done.returncode != 0
    assert "winnow: dequantize: mine.gguf: incomplete GGUF file" in done.stdout + done.stderr
    assert not [*(tmp_path / "results").glob("*/dequantized")]
