"""What the report says beside its tables: the best at each budget, what was chosen, times, and numbers that can be read."""

import re

import numpy as np
import pandas as pd
import pytest

from tests.unit.test_results import small_summary
from winnow.io.artifacts import write_json, write_manifest
from winnow.reporting import formats
from winnow.reporting.best import best_by_budget
from winnow.reporting.chosen import chosen_sizes
from winnow.reporting.report import MANY, render
from winnow.reporting.tables import spread, summary
from winnow.reporting.times import Times, total

FIGURES = {"ranking": "<svg>", "spectra": "<svg>"}
ROUNDED = {"kind": "rounded", "bits": [2, 4, 8], "grids": ["full"], "group": 128}


def page_of(methods: dict[str, float], allocations=(), models=()) -> str:
    """The report of methods at one budget; {method: nats per token above dense in every window}."""
    return render(*tables_of(methods)[:2], dict(FIGURES), tables_of(methods)[2], [], [], allocations, models)


def tables_of(methods: dict[str, float], noise: float = 0.01):
    """(summary, spread, results) of methods at one budget."""
    _, known, _ = small_summary()
    none = {"calibration": "none", "seeds_of": "none", "budget": "dense", "recovery": "none", "targets": "none", "seed": None}
    shared = {"model": "m", "evaluation": "e", "allocation": "ilp", "structure": "rounded", "metric": "gram"}
    dense = {**known["dense"], "per_window": {"nll": [20.0, 30.0, 40.0], "tokens": [10.0] * 3}, "nll": 3.0}
    rows, results = [{**shared, **none, "method": "dense", "keep_requested": 1.0, "result": "dense"}], {"dense": dense}
    for place, (method, above) in enumerate(methods.items()):
        nll = [20 + 10 * above + noise * place, 30 + 10 * above - noise * place, 40 + 10 * above]
        wildcards = {"model": "m-1", "calibration": "c-1", "method": f"{method}-1", "budget": "b-1", "recovery": "none-1"}
        own = {"delta_nll": above, "delta_nll_se": 0.001, "kl": above / 2, "top1_agreement": 0.5, "perplexity": np.exp(3 + above)}
        own |= {"stored_bytes": 500, "model_stored_bytes": 1000, "checkpoint": f"results/m-1/c-1/{method}-1/b-1/checkpoint"}
        windows = {"per_window": {"nll": nll, "tokens": [10.0] * 3}}
        results[method] = {**known["svd0.8"], **own, **windows, "provenance": {"wildcards": wildcards}}
        upstream = {"calibration": "c", "seeds_of": "c", "seed": 0, "budget": "b", "recovery": "none", "targets": "ffn"}
        rows.append({**shared, **upstream, "method": method, "keep_requested": 0.5, "result": method})
    return summary(rows, results), spread(rows, results), results


def test_a_filter_where_there_are_many_methods():
    few = page_of({f"m{i}": 0.1 + i for i in range(3)})
    assert "<script" not in few
    assert "<details open><summary><b>b</b>: 3 methods" in few
    many = page_of({f"m{i}": 0.1 + i for i in range(MANY + 1)})
    assert many.count('id="filter"') == 1
    assert '<p id="filtering" hidden>' in many, "without scripts there is no box"
    assert set(re.findall(r'<tr[^>]* data-method="(\w+)"', many)) == {f"m{i}" for i in range(MANY + 1)}
    assert f"<details><summary><b>b</b>: {MANY + 1} methods" in many
    assert 'src="' not in many


def test_rows_link_to_their_files_relative_to_the_report():
    page = page_of({"one": 0.1})
    for link in (
        "m-1/c-1/one-1/b-1/checkpoint/",
        "m-1/c-1/one-1/b-1/checkpoint/recipe.yaml",
        "m-1/c-1/one-1/b-1/none-1/README.md",
    ):
        assert page.count(f'href="{link}"') == 2, "in the summary and in the table"
    assert "somewhere" not in page, "the dense model is where the user has it"


@pytest.mark.parametrize(
    ("methods", "verdict"),
    [
        ({"a": 0.5}, "the only method"),
        ({"a": 0.5, "b": 0.1}, "yes: a is 0.4000 ± "),
        ({"a": 0.1, "b": 0.1, "c": 0.9}, "no: tied with b"),
        (dict.fromkeys("abcdef", 0.1), "no: tied with b, c, d and 2 more"),
        ({"a": 0.0, "b": 0.5}, "yes: b is 0.5000 ± 0.0006 above it; as dense"),
    ],
)
def test_the_summary_says_whether_the_best_is_better(methods, verdict):
    table, means, _ = tables_of(methods)
    (row,) = best_by_budget(means, table, {})
    assert row["verdict"].startswith(verdict)
    assert row["delta_nll"] == pytest.approx(min(methods.values()))
    assert row["kl"] == pytest.approx(min(methods.values()) / 2)
    assert table.loc[row["at"], "method"] == row["method"]


def test_the_kl_of_several_seeds_is_their_mean():
    table, means, _ = tables_of({"a": 0.5})
    own = table[table["method"] == "a"]
    table = pd.concat([own.assign(calibration=f"c.{seed}", kl=float(seed)) for seed in range(3)], ignore_index=True)
    (row,) = best_by_budget(means, table, {f"c.{seed}": "c" for seed in range(3)})
    assert row["kl"] == 1


def manifest(layers: int = 2) -> dict:
    shapes = {f"self_attn.{role}_proj": [8, 8] for role in "qkvo"}
    shapes |= {"mlp.gate_proj": [32, 8], "mlp.up_proj": [32, 8], "mlp.down_proj": [8, 32]}
    tensors = {f"model.layers.{i}.{n}.weight": {"shape": s, "dtype": "F16"} for i in range(layers) for n, s in shapes.items()}
    return {"model_type": "llama", "tensors": tensors, "tied": {}, "provenance": {"wildcards": {"model": "m-1"}}}


def allocation(method: str, structure: dict, groups: dict[str, tuple[int | None, int]], **more) -> dict:
    """An allocation.json; groups: {name: (size, stored bytes of 100)}."""
    calibration = {"text": "words", "windows": 4, "length": 16}
    names = {"model": "m", "calibration": "c", "method": method, "budget": "b"}
    spec = {"names": names, "presets": {"method": {"structure": structure}, "calibration": calibration}}
    rows = [{"group": name, "size": size, "stored_bytes": stored, "dense_bytes": 100} for name, (size, stored) in groups.items()]
    wildcards = {"model": "m-1", "calibration": "c-1", "method": f"{method}-1", "budget": "b-1"}
    return {"groups": rows, "provenance": {"params": {"spec": spec}, "wildcards": wildcards}, **more}


def chosen(structure: dict, groups: dict[str, tuple[int | None, int]]):
    """(what the sizes are of, {(layer, role): text and shade})"""
    ((one,),) = chosen_sizes([allocation("a", structure, groups)], [manifest()]).values()
    texts = {
        (layer, role): size and (size.text, size.shade)
        for layer, sizes in one.layers
        for role, size in zip(one.roles, sizes, strict=True)
    }
    return one.kinds, texts


def test_sizes_are_shown_by_layer_and_role_rounded_ones_in_bits():
    kinds, texts = chosen(ROUNDED, {"000.q_proj": (1, 15), "000.down_proj": (3, 53), "001.q_proj": (None, 100)})
    assert kinds == "b (bits): rounded, 2; dense, 1"
    assert texts[0, "q_proj"] == ("2b", 1)
    assert texts[0, "down_proj"] == ("8b", 5)
    assert texts[1, "q_proj"] == ("dense", 9)
    assert texts[1, "down_proj"] is None
    assert chosen({"kind": "low_rank"}, {"000.q_proj": (3, 50)}) == ("low_rank, 1", {(0, "q_proj"): ("3", 5)})
    kinds, texts = chosen(ROUNDED | {"rotations": ["none", "both"]}, {"000.q_proj": (1, 15), "000.down_proj": (6, 53)})
    assert kinds == "b (bits): rounded, 1; r (bits): rounded with a rotation, 1"
    assert (texts[0, "q_proj"], texts[0, "down_proj"]) == (("2b", 1), ("8r", 5))


def test_sizes_of_several_structures_are_told_apart():
    mixed = {"kind": "mixed", "members": [{"kind": "gauge_fixed"}, {"kind": "affine_block"}, ROUNDED]}
    groups = {
        "000.q_proj@gauge_fixed": (3, 20),
        "000.k_proj@rounded": (2, 28),
        "001.gate_proj.up_proj.down_proj@affine_block": (7, 40),
    }
    kinds, texts = chosen(mixed, {**groups, "001.q_proj": (0, 100)})
    assert kinds == "b (bits): rounded, 1; g: gauge_fixed, 1; a: affine_block, 1; dense, 1"
    assert (texts[0, "q_proj"], texts[0, "k_proj"], texts[1, "q_proj"]) == (("g3", 2), ("4b", 2), ("dense", 9))
    assert {texts[1, f"{role}_proj"] for role in ("gate", "up", "down")} == {("a7", 4)}
    parts = {"kind": "by_target", "parts": {"attention": {"kind": "shared_basis"}, "ffn": ROUNDED}}
    kinds, texts = chosen(parts, {"000-001.q_proj.k_proj": (4, 30), "000.down_proj": (2, 28)})
    assert kinds == "b (bits): rounded, 1; s: shared_basis, 1"
    assert texts[0, "k_proj"] == texts[1, "q_proj"] == ("s4", 3), "a basis that two layers share"


def test_sizes_of_experts_are_a_range():
    groups = {f"000.expert{i:03d}.up_proj": (size, 10 * size) for i, size in enumerate((2, 6, 4))}
    assert chosen({"kind": "low_rank"}, groups)[1] == {(0, "up_proj"): ("2\u20136", 4)}


def test_methods_with_the_same_sizes_are_shown_once():
    same = {"000.q_proj": (3, 50)}
    made = [allocation(name, {"kind": "low_rank"}, same) for name in ("one", "two", "two")]  # the last of another seed
    made.append(allocation("three", {"kind": "low_rank"}, {"000.q_proj": (4, 60)}))
    found = chosen_sizes(made, [manifest()])
    assert {key: [one.methods for one in of] for key, of in found.items()} == {("m", "c", "b"): [["one", "two"], ["three"]]}


def test_the_page_has_what_was_asked_chosen_and_predicted():
    made = [
        allocation("one", ROUNDED, {"000.q_proj": (1, 15)}, predicted=0.05),
        allocation("two", {"kind": "low_rank"}, {"000.q_proj": (3, 50)}),
    ]
    page = page_of({"one": 0.1, "two": 0.2}, made, [manifest()])
    assert "c: 4 windows of 16 tokens (64) of words" in page
    assert "<td class=h1>2b</td>" in page
    assert ".h1 { background: #" in page
    predicted = re.search(r"<h2>Predicted and measured loss</h2>.*?</table>", page, re.DOTALL).group()
    cells = re.findall(r"<td[^>]*>(.*?)</td>", predicted)
    assert cells == ["one", "b", "m, e", "0.0500", "0.1000 ± 0.0010", "2.00"]


def test_losses_at_13_nats_do_not_hide_the_others():
    table, means, results = tables_of({"one": 0.01, "two": 13.8})
    page = render(table, means, dict(FIGURES), results, [])
    assert "linear below 0.01" in page
    assert "2.0e7" in page, "perplexity"


@pytest.mark.parametrize(
    ("value", "text"),
    [(32.804, "32.80"), (999.994, "999.99"), (12345.6, "12,346"), (40532447.95, "4.1e7"), (1e12, "1.0e12"), (np.inf, "infinite")],
)
def test_perplexities_are_short(value, text):
    assert formats.perplexity(value) == text


@pytest.mark.parametrize(
    ("show", "arguments", "text"),
    [
        (formats.with_error, (0.2, 0.01), "0.2000 ± 0.0100"),
        (formats.with_error, (-1.7e-5, 2.9e-5), "-0.00002 ± 0.00003"),
        (formats.with_error, (-1e-9, 1e-4), "0.0000 ± 0.0001"),
        (formats.with_error, (0.2, float("nan")), "0.2000"),
        (formats.with_error, (float("nan"), 0.1), "\u2013"),
        (formats.loss, (0.0169,), "0.0169"),
        (formats.loss, (2.6e-6,), "2.6e-6"),
        (formats.loss, (0.0,), "0.0000"),
        (formats.loss, (float("nan"),), "\u2013"),
        (formats.duration, (0.66,), "0.7 s"),
        (formats.duration, (42.4,), "42 s"),
        (formats.duration, (185,), "3 min 05 s"),
        (formats.duration, (59.7,), "1 min 00 s"),
        (formats.duration, (7801,), "2 h 10 min"),
        (formats.duration, (None,), "\u2013"),
        (formats.size, (999,), "999 bytes"),
        (formats.size, (2477312,), "2.48 MB"),
        (formats.size, (707072,), "707 kB"),
        (formats.size, (25.3e9,), "25.3 GB"),
        (formats.size, (None,), "\u2013"),
    ],
)
def test_numbers_are_shown_with_the_digits_that_matter(show, arguments, text):
    assert show(*arguments) == text


def job(root, path: str, rule: str, inputs: list[str], seconds: str | None, **wildcards: str) -> str:
    """A result of a job, with its record if it took `seconds`."""
    provenance = {"rule": rule, "wildcards": wildcards, "params": {}, "inputs": dict.fromkeys(inputs, "digest")}
    if path.endswith("manifest.json"):
        write_manifest((root / path).parent, {}, provenance)
    else:
        write_json(root / path, {}, provenance)
    if seconds is not None:
        record = root / "results" / "benchmarks" / rule / f"{'/'.join(wildcards.values())}.tsv"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(f"s\th:m:s\tmax_rss\n{seconds}\t0:00:01\t100.5\n")
    return path


def test_times_are_of_all_jobs_behind_a_result_each_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    at = {"model": "m-1", "calibration": "c-1"}
    tokens = job(tmp_path, "results/m-1/tokens.json", "tokenize", [], "1000", **at)
    moments = job(tmp_path, "results/m-1/c-1/manifest.json", "collect_statistics", [tokens], "2.5", **at)
    fits = [
        job(tmp_path, f"results/m-1/c-1/{m}/manifest.json", "factorize", [moments], "4", **at, method=m) for m in ("a-1", "b-1")
    ]
    made = job(tmp_path, "results/m-1/c-1/x-1/manifest.json", "compress", fits, "1", **at, method="x-1")
    lost = job(tmp_path, "results/m-1/c-1/y-1/manifest.json", "compress", fits, None, **at, method="y-1")
    log = tmp_path / "results" / "logs" / "compress" / "m-1" / "c-1" / "x-1.log"
    log.parent.mkdir(parents=True)
    log.write_text("12:00:00 device cuda, 8 threads\n")
    times = Times()
    found = times.behind(made)
    assert total(found) == 2.5 + 4 + 4 + 1, "statistics once, preparation not"
    assert {one.device for one in found if one.rule == "compress"} == {"cuda, 8 threads"}
    assert {one.memory for one in found} == {100.5 * 2**20}
    assert total(times.behind(lost)) is None, "a job without a record"
    assert total(times.behind("results/gone/manifest.json")) is None
    (tmp_path / moments).write_text("{}")
    assert total(Times().behind(made)) == 9, "a damaged artefact ends the search"
