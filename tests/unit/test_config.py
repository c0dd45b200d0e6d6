"""Configuration: generated files in step, and every mistake named with its file, key and cure."""

import pytest
import yaml

from tests.conftest import ROOT, plain
from winnow.data.texts import check_overlap, read_rows
from winnow.errors import InputError
from winnow.planning import presets
from winnow.planning.config import load
from winnow.planning.config_files import default, generate
from winnow.planning.config_sources import sources
from winnow.planning.plan import Plan


def test_generated_files_are_in_step():
    generate(ROOT, check=True)


def test_a_file_out_of_step_is_named(tmp_path):
    generate(tmp_path, check=False)
    (tmp_path / "config" / "config.yaml").write_text("models: {}\n")
    with pytest.raises(InputError, match=r"config/config\.yaml is out of date"):
        generate(tmp_path, check=True)


def merge(base, extra):
    for key, value in extra.items():
        base[key] = merge(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
    return base


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*/*.yaml")), ids=lambda p: p.stem)
def test_shipped_examples_are_valid(path):
    load(merge(default(), yaml.safe_load(path.read_text())))


@pytest.mark.parametrize("path", sorted((ROOT / "config/studies").glob("*.yaml")), ids=lambda p: p.stem)
def test_no_shipped_study_calibrates_on_what_it_measures(path):
    """The guard that stops such a run is asked before anybody starts one."""
    plan = Plan(load(merge(default(), yaml.safe_load(path.read_text()))), ROOT)
    pairs = {tuple(reversed(plan.cells.texts_of(cell))) for cell in plan.cells.of("perplexity") if cell.calibration}
    for pair in pairs:
        texts = [plan.config.texts[name].model_dump() for name in pair]
        check_overlap(*(read_rows({**text, "files": [str(ROOT / file) for file in text["files"]]}) for text in texts), pair)


def test_every_preset_stands_beside_the_peers():
    studies = [yaml.safe_load((ROOT / f"config/studies/{name}.yaml").read_text()) for name in ("frontier", "presets", "rounding")]
    measured = [method for study in studies for e in study["experiments"].values() for method in e["methods"]]
    assert set(measured) == set(presets.methods()) - {"mixed"}  # which needs an allocation, and is `winnow_factored` then


def refused(change, parts=()):
    config = plain()
    change(config)
    with pytest.raises(InputError) as caught:
        load(config, parts)
    message = str(caught.value)
    assert "\n" not in message
    return message


BYPASS = {"kind": "bypass", "remainder": {"kind": "shared_basis", "bass": "outputs"}, "remainder_metric": {"kind": "gram"}}
MISTAKES = [
    (
        lambda c: c["budgets"]["ffn-0.8"].update(keep_byts=0.7),
        "budgets.ffn-0.8.keep_byts: unknown key; did you mean 'keep_bytes'?",
    ),
    (lambda c: c.update(methds={}), "methds: unknown key; did you mean 'methods'?"),
    (lambda c: c["methods"]["asvd"]["metric"].update(alhpa=1), "methods.asvd.metric.alhpa: unknown key; did you mean 'alpha'?"),
    (lambda c: c["methods"]["asvd"]["structure"].update(rnk=1), "methods.asvd.structure.rnk: unknown key; valid: kind"),
    (
        lambda c: c["methods"]["asvd"].update(structure=BYPASS),
        "asvd.structure.remainder.bass: unknown key; did you mean 'basis'?",
    ),
    (lambda c: c["methods"]["asvd"].update(metric={"knd": "gram"}), "methods.asvd.metric: `kind` is missing"),
    (lambda c: c["methods"]["asvd"]["metric"].update(kind="gramm"), "there is no kind 'gramm'; did you mean 'gram'?"),
    (lambda c: c["experiments"]["demo"].update(methods=["whitned"]), "there is no 'whitned'; did you mean 'whitened'?"),
    (lambda c: c["calibrations"]["demo"].update(text="demo_calibraton"), "did you mean 'demo_calibration'?"),
    (
        lambda c: c["budgets"]["ffn-0.8"].update(keep_bytes=1.2),
        "budgets.ffn-0.8.keep_bytes: Input should be less than or equal to 1",
    ),
    (lambda c: c["budgets"]["ffn-0.8"].update(rank=3), "budgets.ffn-0.8: give exactly one of"),
    (lambda c: c["budgets"]["ffn-0.8"].update(targets=["fnn"]), "budgets.ffn-0.8.targets.0: Input should be"),
    (lambda c: c["budgets"].update(x={"rank": 0}), "budgets.x.rank: Input should be greater than or equal to 1"),
    (lambda c: c["budgets"].update(x={"rank": {"ffn": 0}}), "budgets.x.rank.ffn: Input should be greater than or equal to 1"),
    (lambda c: c["budgets"].update(x={"targets": ["ffn"], "rank": {"qkv": 4}}), "budgets.x: ranks are given by target; remove"),
    (
        lambda c: c["budgets"].update(x={"rank_fraction": {"qkv": 0.5, "attention": 0.2}}),
        "budgets.x: q_proj is named by both 'qkv' and 'attention'",
    ),
    (
        lambda c: c["methods"]["bypass"]["structure"].update(kept=3, kept_fraction=0.1),
        "methods.bypass.structure: give either `kept` or `kept_fraction`",
    ),
    (
        lambda c: c["methods"]["svd"].update(structure={"kind": "by_target", "parts": {"qkv": {"kind": "split"}}}),
        "methods.svd.structure: split replaces a whole FFN",
    ),
    (
        lambda c: c["methods"]["svd"].update(structure={"kind": "by_target", "parts": {"qkv": {"kind": "low"}}}),
        "methods.svd.structure.parts.qkv: there is no kind 'low'; did you mean 'low_rank'?",
    ),
    (lambda c: c["models"]["demo"].update(revision="main"), "models.demo.revision: String should match pattern"),
    (
        lambda c: c["texts"]["demo_evaluation"].update(dataset="wikitext"),
        "texts.demo_evaluation: give either `files` or `dataset`",
    ),
    (lambda c: c["texts"].update(hub={"dataset": "wikitext", "split": "test"}), "texts.hub: a hub data set needs"),
    (lambda c: c["evaluations"]["demo"].update(protocol="p2"), "evaluations.demo: `stride` is required by protocol p2"),
    (lambda c: c["evaluations"]["demo"].update(lenght=8), "evaluations.demo.lenght: unknown key; did you mean 'length'?"),
    (lambda c: c["evaluations"]["demo"].update(protocol="p3"), "evaluations.demo.protocol: Input should be 'p1'"),
    (lambda c: c["evaluations"]["demo"].update(kind="acuracy"), "there is no kind 'acuracy'; did you mean 'accuracy'?"),
    (lambda c: c["evaluations"].update(a={"tasks": ["x"]}), "evaluations.a.tasks: unknown key; valid: compare, kind, length"),
    (
        lambda c: c["evaluations"].update(a={"kind": "accuracy", "tasks": ["x"], "limt": 3}),
        "evaluations.a.limt: unknown key; did you mean 'limit'?",
    ),
    (lambda c: c["evaluations"].update(a={"kind": "accuracy"}), "evaluations.a.tasks: Field required"),
    (
        lambda c: c["evaluations"].update(a={"kind": "latency", "batches": [0]}),
        "evaluations.a.batches.0: Input should be greater than or equal to 1",
    ),
    (lambda c: c["evaluations"].update(a=3), "evaluations.a: Input should be a valid dictionary"),
    (
        lambda c: c["experiments"].update(x={"models": ["demo"], "mthods": ["svd"]}),
        "experiments.x.mthods: unknown key; did you mean 'methods'?",
    ),
    (
        lambda c: c["evaluations"]["demo"].update(text="demo_calibration"),
        "read the same text; calibrate on a text that is not evaluated",
    ),
    (lambda c: c["methods"].update(dense=c["methods"]["svd"]), "methods.dense: the name is reserved"),
    (
        lambda c: c["methods"]["r2lin"].update(metric={"kind": "gram"}),
        "methods.r2lin: affine_block minimises the error of the FFN",
    ),
    (
        lambda c: (c["methods"]["svd_llm_v2"].update(allocation={"kind": "per_typ"}), None),
        "methods.svd_llm_v2.allocation: there is no kind 'per_typ'; did you mean 'per_type'?",
    ),
    (
        lambda c: (
            c["methods"]["ffsplit"].update(allocation={"kind": "ilp"}),
            c["experiments"]["demo"].update(methods=["ffsplit"]),
        ),
        "experiments.demo: budget 'ffn-0.9' needs predicted losses, which split (ffsplit) does not have",
    ),
    (lambda c: c["methods"]["svd"].pop("metric"), "methods.svd: low_rank needs a `metric`"),
    (
        lambda c: c["methods"]["bypass"]["structure"].update(remainder={"kind": "split"}),
        "methods.bypass.structure: split replaces a whole FFN",
    ),
    (lambda c: c["methods"]["coupled"].update(metric={"kind": "fisher"}), "methods.coupled: coupled cannot weight outputs"),
    (
        lambda c: c["methods"]["tiers_activation"]["structure"].update(columns=[0.5, 0.4]),
        "methods.tiers_activation.structure: `columns` and `ranks` must have the same length",
    ),
    (lambda c: c["calibrations"]["demo"].update(seed=0, seeds=[0, 1]), "calibrations.demo: give either `seed` or `seeds`"),
    (lambda c: c["calibrations"]["demo"].update(seeds=[2, 2]), "calibrations.demo: `seeds` has duplicates"),
    (lambda c: c["calibrations"]["demo"].update(seeds=[]), "calibrations.demo.seeds: List should have at least 1 item"),
    (lambda c: c["calibrations"]["demo"].update(seds=[1]), "calibrations.demo.seds: unknown key; did you mean 'seeds'?"),
    (
        lambda c: c["experiments"]["demo"].update(methods=["ffsplit_affine"], export="dense"),
        "experiments.demo.export: 'ffsplit_affine' cannot be exported as a dense model: split_affine has channels",
    ),
    (
        lambda c: c["experiments"]["demo"].update(methods=["svd", "modegpt_mlp"], budgets=["ffn-0.8", "all-0.8"]),
        "experiments.demo: neuron_slice (modegpt_mlp) does not apply to 'attention', a target of budget 'all-0.8'; use",
    ),
    (
        lambda c: (
            c["methods"]["bypass"].update(structure={"kind": "by_target", "parts": {"ffn": {"kind": "low_rank"}}}),
            c["experiments"]["demo"].update(methods=["bypass"], budgets=["all-0.8"]),
        ),
        "experiments.demo: by_target (bypass) does not apply to 'attention', a target of budget 'all-0.8'; use",
    ),
    (
        lambda c: (
            c["budgets"].update(attention={"targets": ["q_proj"], "keep_bytes": 0.8}),
            c["methods"]["clusters_activation"]["structure"].update(axis="neurons"),
            c["experiments"]["demo"].update(methods=["clusters_activation"], budgets=["attention"]),
        ),
        "experiments.demo: cluster (clusters_activation) does not apply to 'q_proj', a target of budget 'attention'; use",
    ),
    (lambda c: c["models"].update({"a/b": {"source": "x"}}), "models.a/b"),
    (
        lambda c: c["models"].update({"a/b": {"source": "x"}}),
        "models.a/b: a name must consist of letters, digits, `_`, `.` and `-`, and",
    ),
    (lambda c: c["budgets"].update({2024: {"rank": 3}}), "budgets.2024: a name must be a string: quote it"),
    (
        lambda c: c["methods"]["svd"].update(structure={"kind": "by_target", "parts": {"fnn": {"kind": "low_rank"}}}),
        "methods.svd.structure.parts.fnn: Input should be 'ffn', ",
    ),
    (lambda c: c["experiments"]["demo"].update(methods=[]), "experiments.demo.methods: List should have at least 1 item"),
    (lambda c: c.pop("models"), "models: Field required"),
]


@pytest.mark.parametrize(("change", "expected"), MISTAKES, ids=[e[:40] for _, e in MISTAKES])
def test_mistakes_are_named(change, expected):
    assert expected in refused(change)


def test_the_file_that_holds_the_key_is_named(tmp_path):
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.write_text("budgets: {mine: {keep_byts: 0.5}}\n")
    two.write_text("budgets: {other: {keep_bytes: 0.5}}\n")

    def change(config):
        config["budgets"]["mine"] = {"keep_byts": 0.5}

    assert refused(change, sources([], [one, two])).startswith(f"{one}: budgets.mine.keep_byts: unknown key")


def test_the_nearest_bytes_are_an_option_of_budgets_in_bytes():
    content = plain()
    content["budgets"]["x"] = {"targets": ["ffn"], "keep_bytes": 0.25, "nearest": True}
    budgets = load(content).budgets
    assert budgets["x"].model_dump()["nearest"] is True
    assert budgets["ffn-0.9"].model_dump()["nearest"] is False
    content["budgets"]["x"] = {"targets": ["ffn"], "rank": 3, "nearest": True}
    with pytest.raises(InputError, match="nearest: is for `keep_bytes`; remove it"):
        load(content)
