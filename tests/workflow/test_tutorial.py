"""The tutorial, and what README.md says of one's own model, in a copy of the checkout: as it stands there, on less."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, pico
from tests.pages import TUTORIAL, blocks, documented
from tests.unit.gguf_files import write_gguf
from winnow.planning import presets

pytestmark = pytest.mark.workflow
RESOURCES = ROOT / "resources"
FEW = {"gauge_fixed", "rounded"}  # members of the recommended preset


class Checkout:
    """A copy of what a user has cloned, with a model and two texts where the documentation says that they are."""

    def __init__(self, folder: Path):
        self.folder = folder / "checkout"
        left_out = shutil.ignore_patterns(".*", "results", "site", "tests", "mine.yaml", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, self.folder, ignore=left_out)
        model = self.folder / "path" / "to" / "a" / "model" / "directory"
        pico("llama").save_pretrained(model)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(RESOURCES / "models" / "demo" / name, model / name)
        write_gguf(self.folder / "path" / "to" / "model.gguf", kind="Q8_0")
        for name, part in (("train.txt", "calibration"), ("test.txt", "evaluation")):
            rows = (RESOURCES / "texts" / "demo" / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()
            (self.folder / name).write_text("\n\n".join(json.loads(row)["text"] for row in rows), encoding="utf-8")
        programs = folder / "bin"
        programs.mkdir()
        (programs / "winnow").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m winnow "$@"\n', encoding="utf-8")
        (programs / "winnow").chmod(0o755)
        path = f"{programs}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.variables = {**os.environ, "PATH": path, "PYTHONPATH": str(self.folder / "src")}

    def run(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self.variables, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
        return done.stdout

    def smaller(self) -> None:
        """Less of what mine.yaml asks for: what is tested are the commands."""
        path = self.folder / "mine.yaml"
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        for section in ("calibrations", "evaluations"):
            for preset in config[section].values():
                preset |= {"windows": 8, "length": 64}
        structure = (method := copy.deepcopy(presets.methods()["winnow"]))["structure"]
        structure["members"] = [member for member in structure["members"] if member["kind"] in FEW]
        for member in structure["members"]:
            member |= {"bits": [4, 8]} if member["kind"] == "rounded" else {}
        config["methods"] = {"winnow": method}
        path.write_text(yaml.safe_dump(config), encoding="utf-8")


@pytest.fixture
def checkout(tmp_path) -> Checkout:
    return Checkout(tmp_path)


@pytest.mark.parametrize("call", documented("winnow init "))
def test_what_init_writes_is_planned(checkout, call):
    """By the line that it prints."""
    (plan,) = re.findall(r"snakemake plan .*mine\.yaml", checkout.run(*shlex.split(call)))
    assert plan in documented("snakemake")
    assert "# " in (checkout.folder / "mine.yaml").read_text(encoding="utf-8"), "comments"
    keeps = call.split("--keep ")[1].split(" --")[0].split() if "--keep" in call else ["0.4"]
    assert f"{1 + len(keeps)} cells" in checkout.run(*shlex.split(plan)), "the dense model, and one per budget"


def test_the_tutorial_runs(checkout):
    first, *commands = documented("winnow ", "snakemake", paths=[TUTORIAL])
    assert first.startswith("winnow init resources/models/demo")
    checkout.run(*shlex.split(first))
    checkout.smaller()
    for command in commands:
        found = next(iter(sorted(checkout.folder.glob("results/*/*/winnow-*/*/checkpoint"))), None)
        printed = checkout.run(*(word.replace("<checkpoint>", str(found)) for word in shlex.split(command)))
        assert command != "winnow show results" or "above dense" in printed
    (code,) = blocks(language="python", paths=[TUTORIAL])
    assert "The module defines" in checkout.run("python", "-c", code)
    assert (checkout.folder / "exported" / "model.safetensors").is_file()
    assert (checkout.folder / "shared" / "recipe.yaml").is_file()


def test_the_python_of_the_readme_runs(checkout):
    (code,) = blocks(language="python", start="import winnow\nfrom transformers import AutoTokenizer")
    assert "train, 128, 256" in code
    assert "test, 256" in code
    loss = checkout.run("python", "-c", code.replace("train, 128, 256", "train, 8, 64").replace("test, 256", "test, 64, 8"))
    assert 5 < float(loss) < 9, "nats per token of a random model of 1,024 tokens"
    assert (checkout.folder / "compressed" / "model.safetensors").is_file()
