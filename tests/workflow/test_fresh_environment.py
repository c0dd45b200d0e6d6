"""Fresh virtual environments with packages of constraints.txt: winnow without Snakemake loads the demo checkpoint, generates and
exports; an environment without winnow loads the export. Takes minutes and gigabytes, so it is slow."""

import json
import os
import shutil
import subprocess
import venv
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from tests.conftest import ROOT
from tests.unit.test_checkpoint import build

pytestmark = pytest.mark.slow
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

    def __init__(self, folder: Path, *packages: str):
        venv.create(folder, with_pip=True, system_site_packages=False)
        self.python = folder / "bin" / "python"
        self.variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
        install = [
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--constraint",
            str(ROOT / "constraints.txt"),
        ]
        self.run(*install, *packages)

    def run(self, *arguments: str) -> str:
        """What a Python command prints, run outside of the checkout."""
        command, place = [str(self.python), *arguments], self.python.parents[2]
        done = subprocess.run(command, cwd=place, env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def load(self, directory: Path, out: Path, first: str) -> dict:
        return json.loads(self.run("-c", LOAD.format(first=first), str(directory), str(out)).splitlines()[-1])


def test_checkpoint_and_export_load_where_a_user_is(tmp_path):
    source = shutil.copytree(ROOT / "resources" / "models" / "demo", tmp_path / "demo")
    checkpoint = build(source, tmp_path / "work", ["ffn", "attention"], 0.8)
    project = tmp_path / "project"  # a copy, so that building writes nothing into the checkout
    shutil.copytree(ROOT / "src", project / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, project / name)
    user = Environment(tmp_path / "user", str(project))
    compressed = user.load(checkpoint, tmp_path / "compressed.safetensors", "import winnow")
    print("with winnow alone:", compressed)
    assert "snakemake" in compressed["absent"]
    assert "winnow" not in compressed["absent"]
    assert user.run("-m", "winnow", "export", str(checkpoint), str(tmp_path / "dense"))
    other = Environment(tmp_path / "other", "torch", "transformers")
    dense = other.load(tmp_path / "dense", tmp_path / "dense.safetensors", "")
    print("without winnow:", dense)
    assert {"winnow", "snakemake"} <= set(dense["absent"])
    assert dense["text"] == compressed["text"]
    one, two = (load_file(tmp_path / f"{name}.safetensors") for name in ("compressed", "dense"))
    far = {dtype: float((one[dtype] - two[dtype]).abs().max()) for dtype in one}
    own = float((one["torch.float32"] - one["torch.float64"]).abs().max())
    largest = float(one["torch.float64"].abs().max())
    print(f"largest difference of logits {far}, of logits up to {largest:.1f}; float32 by itself: {own:.2e} from float64")
    assert far["torch.float64"] <= 1e-5, "what is stored"
    # In float32 both models round in every layer, each in an order of its own: equal as PyTorch itself judges float32, which is
    # within 1e-5, and 1.3e-6 of a logit's own size beside it.
    assert_close(two["torch.float32"], one["torch.float32"], atol=1e-5, rtol=1.3e-6)
