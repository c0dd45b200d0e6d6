"""Configuration files as people write them: keys that stand twice, names that are no texts, and whose mistake it is."""

import json

import pytest
import yaml

from tests.conftest import ROOT
from winnow.commands.planned import plan_of
from winnow.errors import InputError

BUDGET = "{targets: [ffn], keep_bytes: 0.5}"


def refused(tmp_path, *texts: str, ending: str = "yaml") -> str:
    """The line that files of these contents are refused with, beside the default configuration, their folder left out."""
    files = [tmp_path / f"{name}.{ending}" for name, _ in zip("abc", texts, strict=False)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text)
    with pytest.raises(InputError) as caught:
        plan_of(files, replace=False)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{tmp_path}/", "")


def test_a_key_that_stands_twice_is_named_with_its_lines(tmp_path):
    twice = "budgets:\n  x:\n    targets: [ffn]\n    keep_bytes: 0.5\n    keep_bytes: 0.6\n"
    assert refused(tmp_path, twice) == "a.yaml, line 5: budgets.x.keep_bytes is already given in line 4; keep one of them"
    sections = f"budgets:\n  x: {BUDGET}\ntexts: {{}}\nbudgets:\n  y: {BUDGET}\n"
    assert refused(tmp_path, sections) == "a.yaml, line 4: budgets is already given in line 1; keep one of them"
    quoted = "methods: {m: {structure: {kind: low_rank, 'kind': gauge_fixed}, metric: {kind: gram}}}\n"
    assert refused(tmp_path, quoted).startswith("a.yaml, line 1: methods.m.structure.kind is already given in line 1")
    inside = "methods: {m: {structure: {kind: mixed, members: [{kind: low_rank}, {kind: rounded, bits: [8], bits: [4]}]}}}\n"
    assert "methods.m.structure.members.1.bits is already given in line 1" in refused(tmp_path, inside)
    merges = "texts:\n  a: &a {dataset: x}\n  b: &b {dataset: y}\n  c:\n    <<: *a\n    <<: *b\n"
    assert "texts.c.<< is already given in line 5" in refused(tmp_path, merges)


def test_a_merge_is_no_second_key(tmp_path):
    """`<<` puts keys of others beside those that stand there, which win; also where a merged map was itself merged."""
    text = "budgets:\n  a: &a {targets: [ffn], keep_bytes: 0.5}\n  b: &b {<<: *a, keep_bytes: 0.6}\n"
    text += "  c: {<<: *b, targets: [attention]}\n"
    (tmp_path / "a.yaml").write_text(text)
    found = plan_of([tmp_path / "a.yaml"], replace=False).config.budgets
    assert [found[name].keep_bytes for name in "abc"] == [0.5, 0.6, 0.6]
    assert found["c"].targets == ["attention"]


@pytest.mark.parametrize("path", sorted((ROOT / "config").rglob("*.yaml")), ids=lambda path: path.stem)
def test_files_of_the_checkout_are_read_as_before(path):
    from winnow.planning.config_sources import read_source

    assert read_source(path).content == yaml.safe_load(path.read_text())


def test_json_is_as_strict(tmp_path):
    text = '{"budgets": {"x": {"keep_bytes": 0.5,\t"keep_bytes": 0.6}}}'
    assert refused(tmp_path, text, ending="json") == "a.json: duplicate key 'keep_bytes' in an object"
    (tmp_path / "b.json").write_text(json.dumps({"budgets": {"x": {"targets": ["ffn"], "keep_bytes": 0.5}}}, indent="\t"))
    assert "x" in plan_of([tmp_path / "b.json"], replace=False).config.budgets


@pytest.mark.parametrize(
    ("name", "kind"),
    [("2024", "a number"), ("0.80", "a number"), ("no", "true or false"), ("null", "nothing"), ("2024-01-01", "a date")],
)
def test_a_name_that_is_no_text_is_to_be_quoted(tmp_path, name, kind):
    line = refused(tmp_path, f"budgets:\n  {name}: {BUDGET}\n")
    assert line == f'a.yaml, line 2: budgets.{name}: YAML reads this name as {kind}; quote it: "{name}"'
    (tmp_path / "a.yaml").write_text(f'budgets:\n  "{name}": {BUDGET}\n')
    assert name in plan_of([tmp_path / "a.yaml"], replace=False).config.budgets


def test_a_text_that_is_none_is_to_be_quoted(tmp_path):
    line = refused(tmp_path, f'budgets: {{"0.8": {BUDGET}}}\nexperiments: {{demo: {{budgets: [0.8]}}}}\n')
    assert line == "a.yaml: experiments.demo.budgets.0: Input should be a valid string, not 0.8: quote it"


@pytest.mark.parametrize(("length", "ok"), [(150, True), (151, False), (260, False)])
def test_a_name_that_no_file_can_have_is_refused_with_its_section(tmp_path, length, ok):
    """260 letters were an error of the operating system in the middle of a run."""
    name, mixed = "n" * length, "{structure: {kind: mixed}, metric: {kind: gram}}"
    text = f"methods: {{{name}: {mixed}}}\nrecoveries: {{{name}: {{kind: refine}}}}\n"
    if not ok:
        said = f"a name must have at most 150 characters, since it is part of file names; this one has {length}"
        assert refused(tmp_path, text) == f"a.yaml: methods.{name}: {said}"
        return
    (tmp_path / "a.yaml").write_text(text)
    plan = plan_of([tmp_path / "a.yaml"], replace=False)
    longest = max((label for labels in plan.labels.values() for label in labels.values()), key=len)
    assert longest.startswith(name)
    assert len(f"..{longest}.safetensors.state.partial-4194304") <= 255


# (contents of files, by precedence; the beginning of the line) of mistakes in a user's files beside the default's keys
WHOSE = [
    (["budgets: {ffn-0.8: {keep_bytes: 1.2}}"], "a.yaml: budgets.ffn-0.8.keep_bytes: Input should be less"),
    (["experiments: {demo: {methods: [whitned]}}"], "a.yaml: experiments.demo.methods: there is no 'whitned'"),
    (["calibrations: {demo: {text: nowhere}}"], "a.yaml: calibrations.demo.text: there is no 'nowhere'"),
    (["methods: {dense: {structure: {kind: low_rank}, metric: {kind: gram}}}"], "a.yaml: methods.dense: the name is reserved"),
    (["recoveries: {none: {kind: refine}}"], "a.yaml: recoveries.none: the name is reserved"),
    (["methods: {asvd: {metric: {kind: gram}}}"], "a.yaml: methods.asvd.metric.alpha: unknown key"),  # the default's
    (
        ["methods: {svd: {structure: {kind: neuron_slice}, metric: null}}"],
        "a.yaml: experiments.demo: neuron_slice (svd) does not apply to 'attention'",
    ),
    (
        ["evaluations: {demo: {text: demo_calibration}}"],
        "a.yaml: experiments.demo: calibration 'demo' and evaluation 'demo' read",
    ),
    (["budgets: {x: {keep_byts: 0.5}}", "budgets: {y: {keep_bytes: 0.5}}"], "a.yaml: budgets.x.keep_byts: unknown key"),
    (["budgets: {ffn-0.8: {keep_bytes: 1}}", "budgets: {ffn-0.8: {rank: 1}}"], "b.yaml: budgets.ffn-0.8: give exactly one"),
    (["methds: {}", "budgets: {}"], "a.yaml: methds: unknown key; did you mean 'methods'?"),
]


@pytest.mark.parametrize(("texts", "expected"), WHOSE, ids=[expected[:40] for _, expected in WHOSE])
def test_a_mistake_is_that_of_the_file_that_makes_it(tmp_path, texts, expected):
    assert refused(tmp_path, *texts).startswith(expected)


def test_a_section_that_is_missing_is_missing_in_the_users_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("texts: {}\n")
    with pytest.raises(InputError, match=r"mine\.yaml: models: Field required"):
        plan_of([tmp_path / "mine.yaml"], replace=True)


def test_files_that_hold_no_configuration(tmp_path):
    assert refused(tmp_path, "- models\n") == "a.yaml: not a mapping of sections, see config/README.md"
    assert refused(tmp_path, "budgets: {x: [}\n").startswith("a.yaml, line 1: not YAML: ")
    assert refused(tmp_path, "budgets: " + "[" * 2000) == "a.yaml: nested too deep to be read"
    with pytest.raises(InputError, match=r"nowhere\.yaml: not readable: No such file"):
        plan_of([tmp_path / "nowhere.yaml"], replace=False)


def test_a_mistake_in_an_argument_is_not_that_of_a_file(tmp_path):
    from winnow.planning.config import load
    from winnow.planning.config_sources import merged, sources

    (tmp_path / "mine.yaml").write_text(f"budgets: {{x: {BUDGET}}}\n")
    parts = sources([ROOT / "config" / "config.yaml"], [tmp_path / "mine.yaml"], {"budgets": {"x": {"keep_bytes": "2"}}})
    with pytest.raises(InputError, match=r"^--config: budgets\.x\.keep_bytes: Input should be less than or equal to 1"):
        load(merged(parts), parts)


def test_arguments_are_as_strict():
    from winnow.planning.config_sources import check_arguments, sources

    check_arguments(
        [
            "snakemake",
            "-n",
            "--config",
            "memory_gb=3",
            "budgets={x: {rank: 3}}",
            "note={a, [",
            "--cores",
            "2",
            "--config=prune=true",
        ]
    )
    for arguments, line in (
        (["--config", "prune=true", "prune=false"], "--config: duplicate key prune; keep one of them"),
        (
            ["-C", "budgets={x: {rank: 3, rank: 4}}"],
            "--config budgets, line 1: x.rank is already given in line 1; keep one of them",
        ),
        (
            ["--config=budgets={x: {rank: 3, rank: 4}}"],
            "--config budgets, line 1: x.rank is already given in line 1; keep one of them",
        ),
    ):
        with pytest.raises(InputError) as caught:
            sources([], [], {}, arguments)
        assert str(caught.value) == line
