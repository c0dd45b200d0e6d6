"""README.md and docs/: what they say is run, has the numbers of a run, and leads somewhere."""

import ast
import fnmatch
import importlib.util
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from unittest.mock import patch

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.pages import PATHS, PROGRAMS, blocks, documented
from winnow.__main__ import main, parser
from winnow.allocation.base import ALLOCATIONS
from winnow.metrics.base import METRICS
from winnow.planning.config import Config, load
from winnow.planning.config_files import default
from winnow.structures.base import STRUCTURES

README = (ROOT / "README.md").read_text(encoding="utf-8")
INSTALL, TUTORIAL = "tests/workflow/test_install.py", "tests/workflow/test_tutorial.py"
RUN_BY = {  # documented commands: the test that runs them as they stand there
    "make *": "tests/unit/test_docs.py::test_make_runs_what_is_documented",
    "snakemake*": f"{INSTALL}::test_documented_commands_run",
    "winnow show *": f"{INSTALL}::test_documented_commands_run",
    "winnow explain *": f"{INSTALL}::test_documented_commands_run",
    "winnow export <checkpoint> <new directory>": f"{INSTALL}::test_the_wheel_alone_loads_exports_and_shares_the_checkpoint",
    "winnow export --format *": "tests/unit/test_export_engines.py::test_the_documented_command_says_bytes_and_programs",
    "winnow export --format gguf *": "tests/unit/test_gguf.py::test_the_documented_command_says_bytes_and_what_is_exact",
    "winnow share <checkpoint> <new directory>": f"{INSTALL}::test_the_wheel_alone_loads_exports_and_shares_the_checkpoint",
    "pip install '.[[]workflow,slurm]'": f"{INSTALL}::oldest",
    "pip install '.[[]vllm]'": "tests/engines/test_vllm.py::python",
    "winnow lm-eval *": "tests/unit/test_accuracy.py::test_the_command_of_the_documentation_in_a_process_of_its_own",
    "winnow init *": f"{TUTORIAL}::test_what_init_writes_is_planned",
    "winnow * <checkpoint> exported": f"{TUTORIAL}::test_the_tutorial_runs",
    "winnow * <checkpoint> shared": f"{TUTORIAL}::test_the_tutorial_runs",
}


def hooks():
    """docs/hooks.py as mkdocs imports it."""
    with patch.object(sys, "path", [str(ROOT / "docs"), *sys.path]):
        spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def test_the_readme_is_short():
    assert len(README.encode()) <= 8192


def test_the_readme_has_the_numbers_of_the_demo(tmp_path, capsys, monkeypatch):
    """Both are copied from one run by docs/update.py."""
    (tmp_path / "tables").mkdir()
    shutil.copyfile(ROOT / "docs" / "results" / "demo.csv", tmp_path / "tables" / "summary.csv")
    monkeypatch.setattr(sys, "argv", ["winnow", "show", str(tmp_path), "--markdown"])
    main()
    block = README.split("<!-- results -->\n")[1].split("<!-- end of results -->")[0]
    assert block == capsys.readouterr().out
    assert len(block.splitlines()) > 5


def test_what_the_readme_says_of_the_divergence_is_so():
    assert "by the divergence (right), `winnow` is closer to dense at every budget" in " ".join(README.split())
    rows = pd.read_csv(ROOT / "docs" / "results" / "demo.csv").query("method != 'dense'")
    kl = rows.pivot(index="budget", columns="method", values="kl")
    assert (kl["winnow"] < kl.drop(columns="winnow").min(axis=1)).all()


def test_the_design_space_is_drawn_with_all_kinds():
    drawn = set(re.findall(r">(\w+)</text>", (ROOT / "docs" / "space.svg").read_text(encoding="utf-8")))
    assert {*STRUCTURES, *METRICS, *ALLOCATIONS} <= drawn, "python docs/draw_space.py"


def test_the_demo_is_that_of_the_default_configuration():
    """Its methods and budgets are the rows and columns."""
    ((_, experiment),) = default()["experiments"].items()
    head, _, *rows = README.split("<!-- results -->\n")[1].split("\n\n")[0].splitlines()
    assert [cell.strip() for cell in head.split("|")[2:-1]] == experiment["budgets"]
    assert [row.split("|")[1].strip() for row in rows] == experiment["methods"]


def test_every_documented_command_is_run_by_a_test():
    commands, unused = documented(*PROGRAMS), dict(RUN_BY)
    for command in commands:
        (pattern,) = [known for known in RUN_BY if fnmatch.fnmatchcase(command, known)][-1:] or [None]
        assert pattern, f"{command!r}: no test runs this; write one, and name it in RUN_BY"
        unused.pop(pattern, None)
    assert not unused, "nothing documents these any more"
    for place in set(RUN_BY.values()):
        path, _, name = place.partition("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, place


def test_documented_commands_have_these_options_and_targets(tmp_path):
    """The cheap part of running them: every option of `winnow` is parsed, every target and file of `snakemake` exists."""
    place = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(tmp_path)]
    listing = [sys.executable, "-m", "snakemake", "--list-rules", *place]
    listed = subprocess.run(listing, capture_output=True, text=True, check=True).stdout
    rules = {words[0] for words in map(str.split, listed.splitlines()) if words}
    for command in documented("winnow ", "snakemake"):
        program, *words = shlex.split(command.replace("<new directory>", "new"))
        if program == "winnow":
            name, *options = words
            if name != "lm-eval":
                parser().parse_args([name, *options])
            continue
        alone = "--replace-workflow-config"  # the option that has no value
        values = {value for option, value in itertools.pairwise(words) if option.startswith("--") and option != alone}
        targets = {word for word in words if not word.startswith("-")} - values - {"rules", "host", "reason"}
        assert targets <= rules, command
        for value in values:
            assert "/" not in value or (ROOT / value).exists(), command


def test_make_runs_what_is_documented():
    """`make demo` is `snakemake` and `winnow show results`; `make test` is this suite."""
    for target, lines in (("demo", ["snakemake --cores 2", "winnow show results"]), ("test", ['pytest -m "not slow"'])):
        done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True, check=True)
        assert all(line in done.stdout for line in lines), done.stdout
    targets = {line.split()[1] for line in documented("make ")}
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_configuration_of_every_page_is_valid():
    """Alone, or in the sections of the default."""
    found = blocks(language="yaml")
    assert len(found) > 3
    for block in found:
        given = yaml.safe_load(block)
        whole = given if "experiments" in given else default()
        if whole is not given:
            for section, entries in given.items():
                whole[section] = whole.get(section, {}) | entries
        load(whole)


def test_links_of_the_readme_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)#]+)", README) if not link.startswith("http")]
    assert len(links) > 20
    for link in links:
        assert (ROOT / link).exists(), link
    pages = {str(path.relative_to(ROOT)) for path in PATHS} - {"README.md"}
    assert pages <= set(links), "every page can be reached from the README"


def test_a_table_of_results_becomes_the_table_of_its_rows(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("model,preset,all-0.5,all-0.5 error\none,a,0.10,0.010\none,b,,\ntwo,a,0.2,0.1\n", encoding="utf-8")
    rows = hooks().table(path, "one").splitlines()
    assert rows == ["| preset | all-0.5 |", "|---|---:|", "| `a` | 0.10 ± 0.010 |", "| `b` | \N{EN DASH} |"]
    with pytest.raises(AssertionError, match="no rows of three"):
        hooks().table(path, "three")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    options = ["--strict", "--quiet", "--site-dir", str(folder)]
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r'(<script[^>]* src|<img[^>]* src|<link[^>]* href)="?(https?:)?//', text), page


def test_the_site_has_a_page_for_every_section_and_structure_and_every_row_of_results(site):
    made = {path.stem for path in (site / "reference").glob("*/*.html")}
    assert {*Config.model_fields, *STRUCTURES} <= made
    models = (site / "models.html").read_text(encoding="utf-8")
    assert models.count("<tr>") >= len((ROOT / "docs" / "results" / "models.csv").read_text().splitlines()) - 1
    assert "<!-- generated:" not in "".join(path.read_text(encoding="utf-8") for path in site.rglob("*.html"))
