"""Artefacts, tables, figures and report: atomic, verified, self-contained, the same bytes for the same input."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from winnow.commands.show import markdown, show, with_error
from winnow.errors import InputError
from winnow.evaluation.spread import paired
from winnow.factors.spectra import effective_ranks, spectrum_row
from winnow.io.artifacts import (
    Bundle,
    atomic,
    read_json,
    read_markup,
    read_parquet,
    read_tensors,
    write_json,
    write_manifest,
    write_markup,
    write_parquet,
    write_tensors,
)
from winnow.reporting.chosen import dense_bits
from winnow.reporting.figures import LEGIBLE, effective_rank, save
from winnow.reporting.frontier import frontier, ranking
from winnow.reporting.report import render
from winnow.reporting.scales import plain, threshold
from winnow.reporting.tables import COLUMNS, SPREAD, spread, summary

CONTRACT = [
    "model",
    "calibration",
    "method",
    "structure",
    "metric",
    "budget",
    "allocation",
    "recovery",
    "evaluation",
    "keep_requested",
    "dense_bytes",
    "stored_bytes",
    "keep_bytes",
    "model_dense_bytes",
    "model_stored_bytes",
    "windows",
    "tokens",
    "nll",
    "nll_se",
    "perplexity",
    "delta_nll",
    "delta_nll_se",
    "kl",
    "top1_agreement",
    "checkpoint",
]
MODULES = [f"self_attn.{role}_proj" for role in "qkvo"] + [f"mlp.{role}_proj" for role in ("gate", "up", "down")]
NAMES = {"model": "m", "evaluation": "e"}
NUMBERS = {
    "windows": 3,
    "tokens": 30,
    "nll": 2.0,
    "nll_se": 0.1,
    "perplexity": 7.4,
    "model_dense_bytes": 1500,
    "checkpoint": "somewhere",
}
PROTOCOL = {
    "protocol": {
        "protocol": "p1",
        "protocol_version": 1,
        "rule": "Rows <joined>.",
        "length": 10,
        "stride": None,
        "dtype": "float32",
    },
    "text": {"text_digest": "a" * 64, "text_tokens": 33, "bos": False},
}
OVERLAP = {
    "calibration": "c",
    "evaluation": "e",
    "of_calibration": 0.0,
    "of_evaluation": 0.001,
    "allowed": 0.01,
    "words_per_run": 24,
}


def small_summary():
    none = {
        "calibration": "none",
        "budget": "dense",
        "allocation": "none",
        "recovery": "none",
        "targets": "none",
        "seeds_of": "none",
        "seed": None,
    }
    rows = [
        {**NAMES, **none, "method": "dense", "structure": "dense", "metric": "none", "keep_requested": 1.0, "result": "dense"}
    ]
    results = {"dense": {**NUMBERS, **PROTOCOL, "dense_bytes": 1000, "stored_bytes": 1000, "model_stored_bytes": 1500}}
    results["dense"]["per_window"] = {"nll": [8.0, 20.0, 30.0], "tokens": [10.0] * 3}
    for method, noise in (("svd", 0.0), ("whitened", 0.5)):
        for keep in (0.8, 0.4):
            key = f"{method}{keep}"
            names = {"calibration": "c", "budget": f"b{keep}", "allocation": "uniform", "recovery": "none", "targets": "ffn"}
            names |= {"seeds_of": "c", "seed": 0}
            kind = {"method": method, "structure": "low_rank", "metric": "gram", "keep_requested": keep, "result": key}
            rows.append({**NAMES, **names, **kind})
            loss = {"delta_nll": 1 - keep, "delta_nll_se": 0.01, "kl": 0.3, "top1_agreement": 0.8}
            size = {"dense_bytes": 1000, "stored_bytes": int(1000 * keep), "model_stored_bytes": int(500 + 1000 * keep)}
            windows = {"nll": [9.0 + noise, 21.0, 30.0 - noise], "tokens": [10.0] * 3}
            results[key] = {**NUMBERS, **PROTOCOL, **loss, **size, "per_window": windows}
    return summary(rows, results), {row["result"]: results[row["result"]] for row in rows}, spread(rows, results)


def test_the_summary_has_the_contracted_columns():
    table, _, _ = small_summary()
    assert COLUMNS[: len(CONTRACT)] == CONTRACT
    assert list(table.columns) == COLUMNS
    dense = table.iloc[0]
    assert (dense["delta_nll"], dense["kl"], dense["top1_agreement"], dense["keep_bytes"]) == (0, 0, 1, 1)
    assert table["keep_bytes"].tolist() == [1.0, 0.8, 0.4, 0.8, 0.4]


def test_figures_are_written_and_repeatable(tmp_path):
    table, _, _ = small_summary()
    row = spectrum_row(
        "000.up_proj", np.array([3.0, 2.0, 1.0]), np.array([14.0, 5.0, 1.0, 0.0]), np.array([0, 7, 14, 21]), "gram"
    )
    for name, draw in (
        ("f", lambda: frontier(table, {"m": 16.0})),
        ("r", lambda: ranking(table)),
        ("e", lambda: effective_rank({})),
        ("s", lambda: effective_rank({("m-1", "c-1", "x-1"): pd.DataFrame([row])})),
    ):
        for ending in ("svg", "png"):
            paths = [str(tmp_path / str(i) / f"{name}.{ending}") for i in range(2)]
            for path in paths:
                save(draw(), [path], PROVENANCE)
            first, second = (Path(path).read_bytes() for path in paths)
            assert len(first) > 1000
            assert first == second


def texts_of(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def test_a_figure_of_many_methods_names_those_that_can_be_told_apart():
    table, _, _ = small_summary()
    rows = table[table["method"] != "dense"]
    own = rows[rows["method"] == "svd"]
    many = [own.assign(method=f"m{i:02d}", delta_nll=own["delta_nll"] + 1 + i) for i in range(30)]
    single = rows.iloc[:1].assign(method="eight", structure="rounded", keep_bytes=0.53)
    figure = frontier(pd.concat([table, *many, single], ignore_index=True), {"m": 16.0})
    loss, divergence = figure.axes
    named = [text for text in texts_of(loss) if text in {*(f"m{i:02d}" for i in range(30)), "svd", "whitened", "eight"}]
    assert len(named) == LEGIBLE + 1
    assert {"m00", "svd", "eight"} <= set(named), "a model that is only rounded is always named"
    assert "m29" not in named
    assert divergence.get_title(loc="left").startswith(f"{LEGIBLE + 1} of 33 methods in colour")
    grey = [line for line in loss.lines if line.get_color() == "0.72"]
    assert len(grey) == 32 - LEGIBLE, "the others are drawn too"


def test_sizes_of_numbers_are_marked_relative_to_those_of_the_dense_model():
    table, _, _ = small_summary()
    for bits, marks in ((16.0, {"8 bits": 0.5}), (32.0, {})):  # of 32 bits, 8 are a quarter, and the smallest share is 0.4
        axis = frontier(table, {"m": bits}).axes[0]
        found = {text.get_text(): text.get_position()[0] for text in axis.texts if text.get_text().endswith(" bits")}
        assert found.pop(f"dense\n{bits:g} bits") == 1.0
        assert found == marks
    records = {f"model.layers.0.{name}.weight": {"shape": [4, 4], "dtype": "BF16"} for name in MODULES}
    records["model.layers.0.mlp.down_proj.weight"] = {"shape": [4, 16], "dtype": "F32"}
    manifest = {"model_type": "llama", "tensors": records, "provenance": {"wildcards": {"model": "a-b-123456"}}}
    assert dense_bits([manifest]) == {"a-b": (6 * 16 * 16 + 64 * 32) / (6 * 16 + 64)}


def test_without_kl_there_is_no_panel_of_it():
    table, _, _ = small_summary()
    assert len(frontier(table, {}).axes) == 2
    assert len(frontier(table.assign(kl=float("nan")), {}).axes) == 1


@pytest.mark.parametrize(
    ("values", "errors", "at"),
    [
        ([0.1, 0.2, 1.0], [0.01] * 3, None),  # one decade
        ([0.01, 0.2, 1.0], [0.0] * 3, 0.01),
        ([13.8, 0.02, 0.5], [0.1, 0.001, 0.01], 0.01),
        ([-0.00002, 0.0005, 0.03, 2.5], [0.0001, 0.0004, 0.001, 0.01], 0.001),  # two cannot be told from 0
        ([0.0, 0.0], [0.0, 0.0], None),
        ([-0.5, 0.3], [1.0, 1.0], None),  # nothing is resolved
        ([1e-12, 1.0], [0.0, 0.0], 1e-6),  # at most six decades
    ],
)
def test_losses_over_decades_have_a_logarithmic_scale_above_their_resolution(values, errors, at):
    found = threshold(values, errors)
    assert found is None if at is None else found == pytest.approx(at)


def test_losses_below_0_are_drawn_on_a_logarithmic_scale():
    table, _, _ = small_summary()
    losses = [0.0, -0.001, 0.5, 0.01, 4.0]
    axis = frontier(table.assign(delta_nll=losses, delta_nll_se=0.002), {}).axes[0]
    assert axis.get_yscale() == "symlog"
    low, high = axis.get_ylim()
    assert low <= -0.005, "with its two standard errors"
    assert high > 4
    hollow = [line for line in axis.lines if line.get_markerfacecolor() == "white"]
    assert [line.get_ydata()[0] for line in hollow] == [-0.001], "what cannot be told from dense is hollow"


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.001, "0.001"), (10.0, "10"), (1e-5, "10⁻⁵"), (-1e-4, "-10⁻⁴"), (2e6, "2·10⁶")]
)
def test_tick_labels_are_plain_where_they_are_short(value, text):
    assert plain(value) == text


def test_methods_with_the_same_spectra_share_a_panel():
    row = spectrum_row("000.up_proj", np.array([3.0, 2.0]), np.array([13.0, 4.0, 0.0]), np.array([0, 7, 14]), "gram")
    other = spectrum_row("000.up_proj", np.array([3.0, 0.1]), np.array([9.0, 0.1, 0.0]), np.array([0, 7, 14]), "gram")
    frames = {("m-1", "c-1", f"{name}-1"): pd.DataFrame([row]) for name in ("one", "two")}
    figure = effective_rank({**frames, ("m-1", "c-1", "three-1"): pd.DataFrame([other])})
    titles = [axis.get_title().splitlines()[-1] for axis in figure.axes if axis.get_visible()]
    assert titles == ["one, two", "three"]


def test_the_report_is_one_file_that_needs_no_network(tmp_path):
    table, results, means = small_summary()
    save(frontier(table, {}), [str(tmp_path / "f.svg")], {})
    svg = (tmp_path / "f.svg").read_text()
    page = render(table, means, {"ranking": svg, "spectra": svg}, results, [OVERLAP])
    assert "<svg" in page
    for attribute in ('src="', "url(http", 'href="http', "@import"):
        assert attribute not in page.replace('xlink:href="#', "")
    assert "0.2000 ± 0.0100" in page
    assert "Rows &lt;joined&gt;." in page, "text is escaped"
    assert page.count('class="best"') == 4, "equal sums over windows are ties"


def over_seeds(losses: dict[str, dict[int, list[float]]], kl: dict[str, dict[int, list[float]]] | None = None) -> pd.DataFrame:
    """The spread table of per-window losses {method: {seed: nll}}, 10 tokens a window, above a dense loss of 0 in each; `kl`:
    likewise divergences, of some methods."""
    windows = len(next(iter(next(iter(losses.values())).values())))
    shared = {"model": "m", "evaluation": "e", "budget": "b", "recovery": "none"}
    rows, results = [{**shared, "method": "dense", "result": "dense"}], {}
    results["dense"] = {"per_window": {"nll": [0.0] * windows, "tokens": [10.0] * windows}}
    for method, by_seed in losses.items():
        for seed, nll in by_seed.items():
            key = f"{method} {seed}"
            rows.append({**shared, "method": method, "seeds_of": "c", "seed": seed, "result": key})
            sizes = {"stored_bytes": 6 + seed, "dense_bytes": 10}
            results[key] = {**sizes, "per_window": {"nll": nll, "tokens": [10.0] * len(nll)}}
            if kl and method in kl:
                results[key]["per_window"]["kl"] = kl[method][seed]
    return spread(rows, results).set_index("method")


def test_with_one_seed_the_spread_is_that_of_the_windows():
    _, results, means = small_summary()
    assert list(means.columns) == SPREAD
    assert means["delta_nll_seed_se"].isna().all()
    assert (means["seeds"] == 1).all()
    assert (means["delta_nll_se"] == means["delta_nll_window_se"]).all()
    for _, row in means.iterrows():
        one = results[row["method"] + row["budget"].removeprefix("b")]["per_window"]
        difference, error = paired(one, results["dense"]["per_window"])
        assert row["delta_nll"] == pytest.approx(difference, abs=1e-15)
        assert row["delta_nll_window_se"] == pytest.approx(error, rel=1e-12)
    assert means["tie"].all(), "equal sums over windows"


def test_the_spread_over_seeds_by_hand():
    """Three seeds, four windows: a mean of 0.2 with values 0.1, 0.2, 0.3 has standard error 0.1 / sqrt(3)."""
    table = over_seeds({"a": {0: [1.0] * 4, 1: [2.0] * 4, 2: [3.0] * 4}})
    row = table.loc["a"]
    assert (row["seeds"], row["best"], row["tie"]) == (3, "a", True)
    assert row["delta_nll"] == pytest.approx(0.2)
    assert row["keep_bytes"] == pytest.approx(0.7)
    assert row["delta_nll_seed_se"] == pytest.approx(0.1 / 3**0.5)
    assert row["delta_nll_window_se"] == 0
    assert row["delta_nll_se"] == pytest.approx(0.1 / 3**0.5)
    assert (row["above_best"], row["above_best_se"]) == (0, 0)
    table = over_seeds({"a": {0: [1.0, 3.0, 1.0, 3.0], 1: [1.0, 3.0, 1.0, 3.0]}})
    assert table.loc["a", "delta_nll_seed_se"] == 0
    assert table.loc["a", "delta_nll_window_se"] == pytest.approx(np.std([0.1, 0.3, 0.1, 0.3], ddof=1) / 2)
    assert table.loc["a", "delta_nll_se"] == table.loc["a", "delta_nll_window_se"], "seeds that agree do not hide the windows"


def test_methods_are_paired_by_seed_and_window():
    """Two methods far apart in every seed and window, though each varies more between seeds and windows than they differ."""
    a = {0: [1.0, 9.0, 4.0], 1: [5.0, 12.0, 8.0], 2: [2.0, 11.0, 5.0]}
    noise = {0: [0.01, -0.01, 0.0], 1: [0.0, 0.01, -0.01], 2: [-0.01, 0.0, 0.01]}
    b = {seed: [x + 0.5 + e for x, e in zip(nll, noise[seed], strict=True)] for seed, nll in a.items()}
    table = over_seeds({"a": a, "b": b})
    assert table["best"].tolist() == ["a", "a"]
    assert table.loc["b", "above_best"] == pytest.approx(0.05)
    assert table.loc["b", "delta_nll_se"] > 0.05, "unpaired they could not be told apart"
    assert table.loc["b", "above_best_se"] < 0.001
    assert table["tie"].tolist() == [True, False]
    swings = {seed: [x + by for x in nll] for (seed, nll), by in zip(a.items(), (3.0, -3.0, 0.6), strict=True)}
    table = over_seeds({"a": a, "b": swings})
    assert table.loc["b", "above_best"] == pytest.approx(0.02)
    assert table.loc["b", "above_best_window_se"] == pytest.approx(0, abs=1e-12)
    assert table.loc["b", "tie"], "the sign changes from seed to seed, which windows alone would not show"


def test_divergences_are_compared_like_losses():
    losses = {"a": {0: [1.0, 2.0], 1: [2.0, 4.0]}, "b": {0: [3.0, 1.0], 1: [2.0, 2.0]}}
    kl = {"a": losses["b"], "b": losses["a"]}
    table, other = over_seeds(losses, kl), over_seeds(kl)
    for ours, theirs in (("kl", "delta_nll"), ("above_closest", "above_best")):
        for end in ("", "_seed_se", "_window_se", "_se"):
            assert table[f"{ours}{end}"].tolist() == other[f"{theirs}{end}"].tolist()
    assert table["closest"].tolist() == other["best"].tolist() != table["best"].tolist()
    assert table["tie_kl"].tolist() == other["tie"].tolist()
    assert over_seeds(losses, {"a": kl["a"]})["kl"].isna().all(), "all are compared, or none"


def test_seeds_scored_on_other_windows_are_refused():
    with pytest.raises(ValueError, match="scored on other windows"):
        over_seeds({"a": {0: [1.0] * 3}, "b": {0: [1.0] * 4}})


def test_show_prints_means_and_ties_if_there_are_several_seeds(tmp_path, capsys):
    table, _, means = small_summary()
    (tmp_path / "tables").mkdir()
    table.to_csv(tmp_path / "tables" / "summary.csv", index=False)
    means.to_csv(tmp_path / "tables" / "spread.csv", index=False)
    show(tmp_path)
    assert "spread.csv" not in capsys.readouterr().out
    a = {0: [1.0, 2.0], 1: [2.0, 3.0]}
    means = over_seeds({"a": a, "b": {s: [x + 5 for x in nll] for s, nll in a.items()}, "same": a}).reset_index()
    means.to_csv(tmp_path / "tables" / "spread.csv", index=False)
    show(tmp_path)
    lines = [
        line for line in capsys.readouterr().out.split("spread.csv")[1].splitlines() if "0.2000 ±" in line or "0.7000" in line
    ]
    assert ["best" in line for line in lines] == [True, False, False]
    assert ["best, tied" in line for line in lines] == [True, False, False]
    assert [", tie" in line for line in lines] == [True, True, False], "of two that cannot be told apart, neither is best alone"
    assert not any("as dense" in line for line in lines)
    markdown(tmp_path)
    assert "| a | 0.200 ± " in capsys.readouterr().out


NONE = {0: [-0.5, 0.3, 0.1], 1: [-0.3, 0.2, -0.1]}  # losses around 0, less than none by chance


def test_a_loss_that_cannot_be_told_from_none_is_said_so_and_no_bold_best(tmp_path, capsys):
    """The lowest is below 0 within its error: it is not better than the dense model, and nothing is made of it."""
    much = {seed: [x + 5 for x in nll] for seed, nll in NONE.items()}
    means = over_seeds({"a": NONE, "b": much}).reset_index()
    row = means[means["method"] == "a"].iloc[0]
    assert row["delta_nll"] < 0 < row["delta_nll"] + 2 * row["delta_nll_se"]
    table, results, _ = small_summary()
    for folder in ("", "tables"):
        (tmp_path / folder).mkdir(exist_ok=True)
    table.to_csv(tmp_path / "tables" / "summary.csv", index=False)
    means.to_csv(tmp_path / "tables" / "spread.csv", index=False)
    show(tmp_path)
    printed = capsys.readouterr().out.split("spread.csv")[1]
    assert "best, as dense" in printed
    assert printed.count("as dense") == 1
    figures = dict.fromkeys(("ranking", "spectra"), "<svg>")
    page = render(table, means, figures, results, []).split("Spread over calibration seeds")[1]
    assert "<td>best, as dense</td>" in page
    assert 'class="best"' not in page
    assert page.count('class="tie"') == 1

    rows = table.assign(delta_nll=[0.0, *[-0.0001] * 4], delta_nll_se=[0.0, *[0.0001] * 4])
    page = render(rows, means, figures, results, []).split("Spread over calibration seeds")[0]
    assert page.count("<td>best, tied, as dense</td>") == 2
    assert page.count("0.0000 ± 0.0289, tie, as dense</td>") == 2
    assert 'class="best"' not in page


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.6519, 0.0098, "0.652 ± 0.010"),
        (0.0041, 0.0005, "0.004 ± 0.001"),
        (0.0041, 0.00049, "0.0041 ± 0.0005"),
        (-0.000052, 0.000041, "-0.00005 ± 0.00004"),
        (-0.00003, 0.0001, "0.0000 ± 0.0001"),
        (1.0, 1e-9, "1.000000 ± 0.000000"),
        (0.0, 0.0, "0.000 ± 0.000"),
    ],
)
def test_a_loss_is_printed_to_the_digits_of_its_error(value, error, text):
    assert with_error(value, error) == text


def test_the_report_shows_several_seeds():
    table, results, means = small_summary()
    figures = dict.fromkeys(("ranking", "spectra"), "<svg>")
    page = render(table, means.assign(seeds=2, delta_nll_seed_se=0.0123), figures, results, [])
    assert "Spread over calibration seeds" in page
    assert "± 0.0123" in page
    plain = render(table, means, figures, results, [])
    assert "Spread" not in plain
    assert "Few calibration tokens" not in plain
    manifests = [
        {"provenance": {"wildcards": {"model": "m-1", "calibration": name}}, "few_tokens": lines}
        for name, lines in (("few-1", ["ffn_input: 9 < 16"]), ("ample-1", []))
    ]
    page = render(table, means, figures, results, [], manifests)
    assert "<li>m-1, few-1: ffn_input: 9 &lt; 16.</li>" in page
    assert "ample-1" not in page


def test_effective_ranks_by_hand():
    ranks = effective_ranks(np.array([3.0, 1.0, 0.0]))
    assert ranks["k90"] == 1
    assert ranks["k95"] == ranks["k99"] == 2
    assert ranks["stable_rank"] == pytest.approx(10 / 9)
    assert ranks["entropy_rank"] == pytest.approx(np.exp(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1))))
    assert effective_ranks(np.ones(8))["entropy_rank"] == pytest.approx(8)
    assert effective_ranks(np.zeros(3))["k90"] == 0


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "a").write_text("before")
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "a") as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), atomic(tmp_path / "folder") as partial:
        partial.mkdir()
        (partial / "x").write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "b.json", {"loss": float("nan")})
    assert not (tmp_path / "b.json").exists()


def test_damaged_artefacts_are_refused_by_name(tmp_path):
    write_tensors(tmp_path / "b" / "x.safetensors", {"a": torch.arange(6.0)}, {"rule": "r"})
    write_manifest(tmp_path / "b", {}, {})
    bundle = Bundle(tmp_path / "b" / "manifest.json")
    assert bundle.tensors("x.safetensors")["a"].tolist() == list(range(6))
    assert read_tensors(tmp_path / "b" / "x.safetensors")[1] == {"rule": "r"}
    path = tmp_path / "b" / "x.safetensors"
    flipped = bytearray(path.read_bytes())
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(InputError, match=r"x\.safetensors: changed since it was written"):
        bundle.tensors("x.safetensors")
    path.unlink()
    with pytest.raises(InputError, match=r"x\.safetensors: missing from its bundle"):
        bundle.verify()


PROVENANCE = {"rule": "r", "wildcards": {"model": "demo-123456"}}
KINDS = {  # of sealed files: how each is written and read
    "json": (lambda p: write_json(p, {"loss": 1.25, "rows": [1, 2, 3]}, PROVENANCE), read_json),
    "parquet": (
        lambda p: write_parquet(p, pd.DataFrame({"a": [1.5, 2.5], "b": [[1], [2, 3]], "c": ["x", "y"]}), PROVENANCE),
        read_parquet,
    ),
    "safetensors": (
        lambda p: write_tensors(p, {"ids": torch.arange(12, dtype=torch.int32)}, {"provenance": PROVENANCE}, sealed=True),
        lambda p: read_tensors(p, sealed=True),
    ),
    "svg": (lambda p: write_markup(p, "<svg><path d='M 0 0'/></svg>", PROVENANCE | {"rule": "r --x"}), read_markup),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_flipped_bit_and_every_truncation_of_a_sealed_file_is_refused_by_name(tmp_path, kind):
    write, read = KINDS[kind]
    path = tmp_path / "demo-123456" / f"artefact.{kind}"
    write(path)
    read(path)
    whole = path.read_bytes()
    changed = rf"artefact\.{kind}: changed since it was written, or not written by winnow; delete it"
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << (place % 8))]) + whole[place + 1 :])
        with pytest.raises(InputError, match=changed):
            read(path)
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=rf"artefact\.{kind}"):
            read(path)


def test_what_a_killed_job_left_is_cleared_by_the_next(tmp_path):
    (tmp_path / ".a.json.partial-1").write_text("half")
    (tmp_path / ".a.json.partial-2").mkdir()
    write_json(tmp_path / "a.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_content_gives_the_same_bytes(tmp_path, kind):
    for i in range(12):
        KINDS[kind][0](tmp_path / str(i) / f"a.{kind}")
    assert len({(tmp_path / str(i) / f"a.{kind}").read_bytes() for i in range(12)}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_of_another_place_is_refused_by_name(tmp_path, kind):
    write, read = KINDS[kind]
    write(tmp_path / "demo-123456" / f"a.{kind}")
    (tmp_path / "other-654321").mkdir()
    foreign = (tmp_path / "demo-123456" / f"a.{kind}").rename(tmp_path / "other-654321" / f"a.{kind}")
    with pytest.raises(InputError, match=rf"other-654321/a\.{kind}: written for another path \(model demo-123456\)"):
        read(foreign)
