"""Libraries that only some stages and commands use: who asks for them, where they are declared, and the line that is said where
one is missing."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.test_explain import provenance
from tests.unit.test_plan import plan_of, wildcards_of
from winnow import __main__ as command_line
from winnow.allocation.base import ALLOCATIONS
from winnow.commands import planned
from winnow.errors import InputError
from winnow.evaluation.base import EVALUATIONS
from winnow.planning import fingerprints as sources
from winnow.planning.explain import differences

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTIONS = {"sklearn": "scikit-learn", "lm_eval": "lm-eval", "yaml": "pyyaml"}  # of modules with another name
LINE = "needs {}, which is not installed; run `pip install '.[workflow]'` in winnow's checkout"


def required(extra: str = "") -> dict[str, str]:
    """{library: its bounds} of an extra of pyproject.toml, by default of winnow itself."""
    listed = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return dict(re.fullmatch(r"([\w-]+)(.*)", entry).groups() for entry in listed)


@pytest.fixture
def without(monkeypatch):
    """Have a library be absent."""

    def hide(absent: str) -> None:
        installed = sources.distribution

        def found(name: str):
            if name == absent:
                raise PackageNotFoundError(name)
            return installed(name)

        monkeypatch.setattr(sources, "distribution", found)
        sources.versions.cache_clear()
        sources._version.cache_clear()

    return hide


def recovering(**options):
    """A plan with a recovery, and the wildcards of a job of it."""
    plan = plan_of(lambda c: c["recoveries"].update(own={"kind": "distill", **options}))
    return plan, {**wildcards_of(plan, "recover"), "recovery": plan.labels["recoveries"]["own"]}


def test_only_lora_asks_for_peft(without):
    without("peft")
    plan, own = recovering()
    assert plan.versions("recover", own).keys() == set(plan.stages["recover"].libraries)
    assert all(plan.versions(n, wildcards_of(plan, n)).keys() == set(s.libraries) for n, s in plan.stages.items())
    plan, own = recovering(parameters="lora")
    with pytest.raises(InputError) as refusal:
        plan.versions("recover", own)
    assert str(refusal.value) == LINE.format("peft")


def test_its_version_is_recorded_where_it_is_used():
    plan, own = recovering(parameters="lora")
    assert plan.versions("recover", own)["peft"] == version("peft")


def test_only_what_is_on_the_hub_asks_for_datasets(without):
    without("datasets")
    plan = plan_of()
    assert "datasets" not in plan.versions("retrieve_text", wildcards_of(plan, "retrieve_text"))
    hub = {"dataset": "some/rows", "revision": "0" * 40}

    def change(c):
        c["texts"]["demo_calibration"] = {**hub, "split": "train"}
        c["evaluations"]["reviews"] = {"kind": "classification", **hub, "train_split": "a", "test_split": "b", "columns": ["x"]}

    plan = plan_of(change)
    for stage, wildcards in (
        ("retrieve_text", {"text": plan.labels["texts"]["demo_calibration"]}),
        ("retrieve_examples", wildcards_of(plan, "retrieve_examples")),
    ):
        with pytest.raises(InputError) as refusal:
            plan.versions(stage, wildcards)
        assert str(refusal.value) == LINE.format("datasets")


def test_explain_says_that_a_library_is_missing(without):
    made = provenance(plan_of(), "figures")
    without("matplotlib")
    assert differences(made, plan_of()) == [LINE.format("matplotlib")]


def test_a_command_says_that_a_library_is_missing(monkeypatch, tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "latency.csv").touch()
    monkeypatch.setattr(sys, "argv", ["winnow", "show", str(tmp_path), "--latency"])
    monkeypatch.delitem(sys.modules, "winnow.evaluation.latency_table", raising=False)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(SystemExit, match=re.escape(f"winnow: show: {LINE.format('pandas')}")):
        command_line.main()


def test_explain_uses_the_checkout_that_it_is_run_in(monkeypatch, tmp_path):
    """A wheel has neither the workflow nor its default configuration."""
    monkeypatch.setattr(planned, "__file__", str(tmp_path / "lib" / "site-packages" / "winnow" / "commands" / "planned.py"))
    monkeypatch.chdir(ROOT)
    assert planned.plan_of([], replace=False).code.root == ROOT
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: not a checkout of winnow")):
        planned.plan_of([], replace=False)


def test_the_extra_of_the_workflow_has_all_that_stages_use():
    used = {library for stage in plan_of().stages.values() for library in stage.libraries} | {"datasets"}
    used |= {library for allocation in ALLOCATIONS.values() for library in allocation.libraries}
    used |= {"peft"}
    assert used <= required().keys() | required("workflow").keys()


def test_snakemake_is_refused_below_the_release_that_is_installed_at_least():
    lowest = required("workflow")["snakemake"].partition(",")[0].removeprefix(">=")
    assert f'min_version("{lowest}")' in (ROOT / "Snakefile").read_text(encoding="utf-8")


def file_of(module: str) -> Path | None:
    path = ROOT / "src" / Path(*module.split("."))
    return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


def imports(body: list[ast.stmt]) -> Iterator[str]:
    """Absolute names that statements import when they run; what is inside of functions is not run."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imports([*node.body, *node.orelse])


@cache
def found_by(module: str) -> frozenset[str]:
    """The modules of winnow and the other libraries that importing a module of winnow imports, itself not followed."""
    file = file_of(module)
    return frozenset(imports(ast.parse(file.read_text(encoding="utf-8")).body)) if file else frozenset()


def libraries_of(file: Path, inside: bool = False) -> set[str]:
    """The libraries that a script has imported when it begins its job; of a plug-in, also those that it imports `inside`
    functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if inside and isinstance(node, ast.FunctionDef)]
    todo, seen, libraries = [name for body in [tree, *functions] for name in imports(body.body)], set(), set()
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.split(".")[0] == "winnow":
            parent = name.rpartition(".")[0]
            todo += [*found_by(name), *([parent] if parent else [])]
        else:
            libraries.add(name.split(".")[0])
    return {DISTRIBUTIONS.get(library, library) for library in libraries - sys.stdlib_module_names}


def test_what_is_imported_is_followed():
    assert {"matplotlib", "pandas"} <= libraries_of(ROOT / "scripts" / "figures.py")
    accuracy = ROOT / "src" / "winnow" / "evaluation" / "kinds" / "accuracy.py"
    assert "lm-eval" in libraries_of(accuracy, inside=True)


def libraries_asked_for(name: str) -> set[str]:
    """Libraries of the stages of a script, or of one stage."""
    stages = plan_of().stages.values()
    return {library for stage in stages if name in (stage.name, stage.kind()) for library in stage.libraries}


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_imports_what_its_stage_asks_for(script):
    """So a library that is missing is said when jobs are planned, and no script ends in a traceback before it has begun."""
    assert libraries_of(script) <= {*required(), *libraries_asked_for(script.stem)}


@pytest.mark.parametrize("kind", EVALUATIONS)
def test_an_evaluation_names_the_libraries_that_it_imports(kind):
    file = ROOT / "src" / Path(*EVALUATIONS.module(kind).split(".")).with_suffix(".py")
    assert libraries_of(file, inside=True) <= {*required(), *libraries_asked_for(f"evaluate_{kind}")}
