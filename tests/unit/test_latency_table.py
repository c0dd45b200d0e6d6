"""The latency table: its rows, and what is printed of them."""

import subprocess
import sys

import pytest

from tests.conftest import pico
from winnow.evaluation.latency import SLOWER, evaluate_latency
from winnow.evaluation.latency_table import COLUMNS, latency_table, lines

SPEC = {"batches": [1, 2], "prompts": [4, 6], "decode": 1, "repeats": 6, "warm_up": 1}
NAMES = {"model": "m", "calibration": "c", "method": "svd", "structure": "low_rank", "metric": "weights", "budget": "half"}
NAMES |= {"allocation": "uniform", "recovery": "none", "evaluation": "speed", "targets": "ffn", "keep_requested": None}


class Clock:
    """A clock that forward passes of the models it watches move on, by what they cost."""

    def __init__(self):
        self.now = 0.0

    def watch(self, model, cost):
        model.register_forward_pre_hook(lambda *_: setattr(self, "now", self.now + cost))
        return model

    def __call__(self, call):
        start = self.now
        call()
        return self.now - start


@pytest.fixture(scope="module")
def table():
    clock = Clock()
    dense, slow = clock.watch(pico("llama"), 1.0), clock.watch(pico("llama"), 2.0)
    record = {"protocol": {**SPEC, "dtype": "float32"}, "dense_bytes": 100, "stored_bytes": 50, "checkpoint": "somewhere"}
    results = {"a": {**record, **evaluate_latency(dense, None, SPEC, "cpu", clock)}}
    results["b"] = {**record, **evaluate_latency(dense, slow, SPEC, "cpu", clock)}
    return latency_table([{**NAMES, "method": "dense", "result": "a"}, {**NAMES, "result": "b"}], results)


def test_one_row_per_cell_phase_batch_and_prompt(table):
    assert list(table.columns) == COLUMNS
    keys = ["method", "phase", "batch", "prompt"]
    assert len(table) == 2 * 2 * 2 * 2 == len(table[keys].drop_duplicates())
    dense, slow = (table[table["method"] == method] for method in ("dense", "svd"))
    assert (dense["ratio"] == 1.0).all()
    assert (table["control_ratio"] == 1.0).all()
    assert (dense["verdict"] == "same within spread").all()
    assert (slow["ratio"] == 2.0).all()
    assert (slow["verdict"] == SLOWER).all()
    assert (slow["dense_tokens_per_second"] == 2 * slow["tokens_per_second"]).all()
    assert (slow["peak_bytes"] == slow["dense_peak_bytes"]).all()
    assert table.drop(columns=["keep_requested"]).notna().all(axis=None)


def test_losing_rows_are_printed_as_such(table, tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    table.to_csv(folder / "latency.csv", index=False)
    printed = lines(folder / "latency.csv")
    assert len(printed) == 1 + len(table)
    assert "m svd half, decode, batch 2, prompt 6: 2.00 [2.00, 2.00] slower than dense; 1 tokens/s (2 dense)" in printed
    command = [sys.executable, "-m", "winnow", "show", "--latency"]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == printed
    done = subprocess.run([*command, str(tmp_path / "nowhere")], capture_output=True, text=True)
    assert "no such table; run `snakemake latency` with" in done.stderr
    assert "Traceback" not in done.stderr
