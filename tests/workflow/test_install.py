"""What README.md and docs/ say, in environments that were empty: the wheel with every documented extra plans and runs one
cell, and the wheel alone loads, exports and hands on its checkpoint. Once with the oldest Snakemake and transformers that
pyproject.toml allows, once with the newest there are. Takes minutes and gigabytes, so it is slow; `make test-install` runs it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.conftest import ROOT, TINY
from tests.pages import blocks, documented
from tests.workflow.test_speed import jobs_of
from winnow.errors import absent

pytestmark = [pytest.mark.slow, pytest.mark.workflow]
SWAPPED = ("snakemake", "transformers")


def lowest(package: str) -> str:
    """The lower bound of a package in pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (bound,) = re.findall(rf"'{package}>=([0-9.]+)", str([project["dependencies"], project["optional-dependencies"]]))
    return bound


LOAD = """
import importlib.util, json, sys
{first}
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
exact, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True, dtype=torch.float64)
assert not any(report.values()), report
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("The module defines the following functions:", return_tensors="pt").input_ids
with torch.no_grad():
    save_file({{str(m.dtype): m.eval()(input_ids=ids).logits for m in (model, exact)}}, sys.argv[2])
text = tokenizer.decode(model.generate(ids, max_new_tokens=12, do_sample=False)[0])
absent = [name for name in ("winnow", "snakemake", "accelerate") if importlib.util.find_spec(name) is None]
print(json.dumps({{"class": type(model).__name__, "absent": absent, "text": text}}))
"""


class Environment:
    """A virtual environment of its own: nothing of the one that the tests run in is visible."""

    def __init__(self, folder: Path, like: "Environment | None" = None):
        """Without packages, or with those that another one has (hard links: pip replaces files and never writes into them)."""
        self.folder = folder
        venv.create(folder, with_pip=like is None, symlinks=True)
        if like:
            shutil.rmtree(folder / "lib")
            shutil.copytree(like.folder / "lib", folder / "lib", copy_function=os.link, symlinks=True)
        # A Slurm that is installed and not running lets its plugin wait ten seconds for it, at every start of Snakemake.
        silent = folder / "bin" / "scontrol"
        silent.write_text("#!/bin/sh\nexit 1\n")
        silent.chmod(0o755)
        outside = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "WINNOW_SAVE_SECONDS")}
        self.variables = {**outside, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}

    def run(self, *command: str, folder: Path | None = None) -> str:
        """What a command prints, by default outside of the checkout."""
        done = self.attempt(*command, folder=folder)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def attempt(self, *command: str, folder: Path | None = None) -> subprocess.CompletedProcess:
        return subprocess.run(command, cwd=folder or self.folder, env=self.variables, capture_output=True, text=True)

    def install(self, *what: str) -> None:
        """Modules are compiled when they are first imported: most never are."""
        self.run("python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile", *what)

    def uninstall(self, package: str) -> None:
        self.run("python", "-m", "pip", "uninstall", "--quiet", "--yes", package)

    def version(self, package: str) -> str:
        return self.run("python", "-c", f"from importlib.metadata import version; print(version('{package}'))").strip()

    def load(self, directory: Path, first: str) -> tuple[dict, dict]:
        """(what it says of a model, its logits by dtype)"""
        out = self.folder / "logits.safetensors"
        said = self.run("python", "-c", LOAD.format(first=first), str(directory), str(out))
        return json.loads(said.splitlines()[-1]), load_file(out)


class Installed:
    """The wheel alone in `bare`, and with the extras of docs/slurm.md in `full`; `checkout` is what a user has cloned."""

    def __init__(self, folder: Path):
        self.checkout, self.constraints = folder / "checkout", folder / "constraints.txt"
        left_out = shutil.ignore_patterns(".*", "results", "site", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, self.checkout, ignore=left_out)
        write_mine(self.checkout)
        pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
        pinned = [line for line in pinned if line.partition("==")[0] not in SWAPPED]
        self.constraints.write_text("\n".join(pinned + [f"{package}=={lowest(package)}" for package in SWAPPED]))
        self.bare = Environment(folder / "bare")
        self.bare.run("python", "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(self.checkout))
        (wheel,) = folder.glob("*.whl")
        (command,) = documented("pip install '.[workflow")
        (what,) = shlex.split(command)[2:]  # .[workflow,slurm]
        self.wheel, self.with_extras = str(wheel), what.replace(".", str(wheel), 1)
        self.bare.install("--constraint", str(self.constraints), self.wheel)
        self.full = Environment(folder / "full", like=self.bare)
        self.full.install("--no-deps", "--force-reinstall", self.wheel)  # its command, of this environment
        self.full.install("--constraint", str(self.constraints), self.with_extras)

    def upgrade(self) -> None:
        """To the newest Snakemake and transformers that are allowed, and of the rest only what these need newer."""
        only = ["--upgrade", "--upgrade-strategy", "only-if-needed"]
        self.bare.install(*only, self.wheel, "transformers")
        self.full.install(*only, self.with_extras, *SWAPPED)


def write_mine(checkout: Path) -> None:
    """mine.yaml of the documentation as it stands there, and a tiny model and two texts where it says that they are."""
    (mine,) = blocks("# mine.yaml")
    (checkout / "mine.yaml").write_text(mine, encoding="utf-8")
    class_name, options = TINY["llama"]
    cls = getattr(transformers, class_name)
    model = checkout / "path" / "to" / "a" / "model" / "directory"
    cls(cls.config_class(**{**options, "max_position_embeddings": 1024})).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(ROOT / "resources" / "models" / "demo" / name, model / name)
    for name, part in (("train", "train"), ("test", "evaluation")):
        rows = (ROOT / "resources" / "texts" / "demo" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
        (file,) = yaml.safe_load(mine)["texts"][name]["files"]
        (checkout / file).write_text("\n".join(json.loads(row)["text"] for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def oldest(tmp_path_factory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module", params=["oldest", "newest"])
def installed(request, oldest) -> Installed:
    """In this order: what is there is upgraded. No result is."""
    if request.param == "newest":
        oldest.upgrade()
    for package in SWAPPED:
        version = oldest.full.version(package)
        print(request.param, package, version)
        assert f"{version}.".startswith(f"{lowest(package)}.") == (request.param == "oldest")
    for name in ("results", ".snakemake"):
        shutil.rmtree(oldest.checkout / name, ignore_errors=True)
    return oldest


def test_a_library_that_is_missing_is_one_line_for_the_stage_that_uses_it(oldest):
    """peft, which is for LoRA alone."""
    lora = {"recoveries": {"lora": {"kind": "distill", "parameters": "lora"}}, "experiments": {"mine": {"recoveries": ["lora"]}}}
    (oldest.checkout / "lora.yaml").write_text(json.dumps(lora), encoding="utf-8")
    plan = ["snakemake", "--dry-run", "--replace-workflow-config", "--configfile", "mine.yaml"]
    oldest.full.uninstall("peft")
    oldest.full.run(*plan, folder=oldest.checkout)
    done = oldest.full.attempt(*plan, "lora.yaml", folder=oldest.checkout)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"winnow: recover: {absent('peft')}"
    assert "Traceback" not in done.stderr
    oldest.full.install("--constraint", str(oldest.constraints), "peft")
    oldest.full.run(*plan, "lora.yaml", folder=oldest.checkout)


def test_documented_commands_run(installed):
    """All of the workflow, as they stand there. Those on mine.yaml compute its cell; what would take long is planned."""
    commands = documented("snakemake", "winnow explain", "winnow show")
    assert {"snakemake prefetch", "snakemake --profile profiles/slurm plan", "snakemake --profile profiles/slurm"} <= {*commands}
    words_of_real = {"--replace-workflow-config", "plan", "prefetch", "prune", "winnow"}
    real = [command for command in commands if words_of_real & {*command.split()}]
    real.sort(key=lambda command: "--replace-workflow-config" not in command)  # what makes results is first
    for command in real:  # one run at a time works in a folder
        words = shlex.split(command.replace("<artefact>", "results/tables/summary.parquet"))
        if command.endswith("--latency"):
            refused = installed.full.attempt(*words, folder=installed.checkout)
            assert "latency.csv: no such table" in refused.stderr, "nothing was timed here"
        else:
            installed.full.run(*words, folder=installed.checkout)
    plans = [[*shlex.split(command), "--dry-run"] for command in commands if command not in real]
    assert len(real) > 7
    assert len(plans) > 5
    with ThreadPoolExecutor(2) as side_by_side:
        list(side_by_side.map(lambda plan: installed.full.run(*plan, folder=installed.checkout), plans))
    assert "whitened" in installed.full.run("winnow", "show", "results", folder=installed.checkout)


def test_a_plan_is_the_same_without_what_is_replaced_of_snakemake(installed):
    command, plans = ["snakemake", "-n", "--cores", "2", "--forceall"], []
    for before in ([], ["env", "WINNOW_PATCHES=0"]):
        done = installed.full.attempt(*before, *command, folder=installed.checkout)
        assert done.returncode == 0, done.stderr
        assert "is not known here" not in done.stderr
        plans.append(jobs_of(done.stdout))
    assert len(plans[0]) > 50
    assert plans[0] == plans[1]


def test_the_wheel_alone_loads_exports_and_shares_the_checkpoint(installed, tmp_path):
    (checkpoint,) = (installed.checkout / "results").glob("*/*/*/*/checkpoint")
    compressed, one = installed.bare.load(checkpoint, "import winnow")
    print("with winnow alone:", compressed)
    assert compressed["absent"] == ["snakemake", "accelerate"]
    (code,) = (block for block in blocks("import winnow") if "results/<model>" in block)
    installed.bare.run(
        "python", "-c", code.replace("results/<model>/<calibration>/<method>/<budget>/checkpoint", str(checkpoint))
    )
    commands = documented("winnow export <checkpoint> <new directory>", "winnow share <checkpoint> <new directory>")
    for number, command in enumerate(commands):
        made = command.replace("<checkpoint>", shlex.quote(str(checkpoint))).replace("<new directory>", f"new-{number}")
        installed.bare.run(*shlex.split(made), folder=tmp_path)
    again, two = installed.bare.load(tmp_path / "new-1", "import winnow")
    assert again == compressed
    assert all(torch.equal(one[dtype], two[dtype]) for dtype in one)
    plain = Environment(tmp_path / "plain", like=installed.bare)
    plain.uninstall("winnow")
    dense, two = plain.load(tmp_path / "new-0", "")
    print("without winnow:", dense)
    assert dense["absent"] == ["winnow", "snakemake", "accelerate"]
    assert dense["text"] == compressed["text"]
    far = {dtype: float((one[dtype] - two[dtype]).abs().max()) for dtype in one}
    own = float((one["torch.float32"] - one["torch.float64"]).abs().max())
    largest = float(one["torch.float64"].abs().max())
    print(f"largest difference of logits {far}, of logits up to {largest:.1f}; float32 by itself: {own:.2e} from float64")
    assert far["torch.float64"] <= 1e-5, "what is stored"
    # In float32 both models round in every layer, each in an order of its own: equal as PyTorch itself judges float32, which is
    # within 1e-5, and 1.3e-6 of a logit's own size beside it.
    assert_close(two["torch.float32"], one["torch.float32"], atol=1e-5, rtol=1.3e-6)
