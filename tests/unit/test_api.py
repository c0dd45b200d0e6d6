"""`winnow.compress` and `winnow.evaluate`: the calls that people write, on a directory and on a model in memory."""

import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import winnow
from tests.conftest import ROOT, pico
from winnow.commands.hand_on import hand_on
from winnow.data.tokens import load_tokenizer
from winnow.errors import InputError

WINDOWS = torch.randint(0, 100, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    pico("llama").to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def logits(model):
    with torch.no_grad():
        return model.eval()(WINDOWS).logits


@pytest.mark.parametrize("method", ["winnow", "whitened", "clusters_activation", "ffsplit", "modegpt_mlp"])
def test_a_method_by_name_meets_its_bytes_and_saves_what_it_returns(directory, tmp_path, method):
    made = winnow.compress(directory, WINDOWS, method, 0.6, targets=["ffn"], nearest=True)  # few sizes, of a small model
    assert made.report.method == method
    assert 0.5 <= made.report.keep_bytes <= 0.6
    assert made.report.stored_bytes == sum(made.report.table()["stored_bytes"])
    assert (made.report.predicted is not None) == (method == "winnow")
    again = AutoModelForCausalLM.from_pretrained(made.save(tmp_path / "checkpoint"))
    assert torch.equal(logits(again), logits(made.model))
    with pytest.raises(InputError, match="exists already"):
        made.save(tmp_path / "checkpoint")


def test_a_model_in_memory_is_left_as_it_is_and_gives_what_its_directory_gives(directory, dense):
    held = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).train()
    before = {name: value.clone() for name, value in held.state_dict().items()}
    made = winnow.compress(held, WINDOWS, "svd", 0.5)
    assert held.training
    assert all(parameter.requires_grad for parameter in held.parameters())
    assert all(torch.equal(before[name], value) for name, value in held.state_dict().items())
    same = winnow.compress(directory, WINDOWS, "svd", 0.5, dtype="bfloat16")
    assert made.report.groups == same.report.groups
    assert torch.equal(logits(made.model), logits(same.model))
    assert not torch.allclose(logits(made.model).float(), logits(dense), atol=1e-3)


def test_too_few_tokens_are_a_warning_with_the_number_of_windows_that_would_do(directory, caplog):
    winnow.compress(directory, WINDOWS, "whitened", 0.6)
    (line,) = (record.message for record in caplog.records if "ffn_hidden" in record.message)
    assert record_levels(caplog) == {"WARNING"}
    assert line.startswith("ffn_hidden: 256 calibration tokens for 96 channels")
    assert "use 48 windows instead of 8" in line
    caplog.clear()
    winnow.compress(directory, WINDOWS.repeat(6, 1), "whitened", 0.6)
    assert not record_levels(caplog)


def record_levels(caplog) -> set[str]:
    return {record.levelname for record in caplog.records if record.levelno >= 30}


def test_a_method_can_be_given_by_its_content(directory):
    content = {"structure": {"kind": "rounded", "bits": [8]}, "metric": {"kind": "weights"}}
    made = winnow.compress(directory, WINDOWS, content, 0.6, targets=["down_proj"], nearest=True)
    assert {row["group"].rpartition(".")[2] for row in made.report.groups} == {"down_proj"}
    assert made.report.keep_bytes < 0.6


def test_losses_are_those_of_the_models_own_definition(dense):
    found = winnow.evaluate(dense, WINDOWS)
    log_p = torch.log_softmax(logits(dense)[:, :-1].double(), -1)
    expected = -log_p.gather(-1, WINDOWS[:, 1:, None]).mean()
    assert found["nll"] == pytest.approx(float(expected), rel=1e-12)
    assert found["tokens"] == 8 * 31
    beside = winnow.evaluate(dense, WINDOWS, dense)
    assert beside["delta_nll"] == 0
    assert beside["top1_agreement"] == 1


def test_windows_of_a_text_are_those_of_the_workflow():
    tokenizer = load_tokenizer(ROOT / "resources" / "models" / "demo")
    text = "The module defines the following functions and classes. " * 40
    ids = tokenizer(text).input_ids
    assert winnow.evaluation_windows(tokenizer, text, 16, 3).tolist() == [ids[16 * i : 16 * (i + 1)] for i in range(3)]
    sampled = winnow.calibration_windows(tokenizer, text, 4, 16, seed=1).tolist()
    assert len({tuple(row) for row in sampled}) == 4
    assert all(row in [ids[16 * i : 16 * (i + 1)] for i in range(len(ids) // 16)] for row in sampled)


REFUSED = [
    ({"windows": WINDOWS.float()}, r"windows: torch.float32 of shape \(8, 32\); give token ids"),
    ({"windows": WINDOWS + 10**6}, "windows: there is no token 10000"),
    ({"windows": WINDOWS, "method": "winow"}, "there is no 'winow'; did you mean 'winnow'"),
    ({"windows": WINDOWS, "keep_bytes": 1.5}, "budgets.asked.keep_bytes: Input should be less than or equal to 1"),
    ({"windows": WINDOWS, "targets": ["fnn"]}, "budgets.asked.targets"),
    ({"windows": WINDOWS, "method": "whitened_learned"}, "allocation 'learned': needs jobs of its own; use the workflow"),
]


@pytest.mark.parametrize(("options", "expected"), REFUSED, ids=[expected[:30] for _, expected in REFUSED])
def test_bad_input_is_one_line(directory, options, expected):
    with pytest.raises(InputError, match=expected) as error:
        winnow.compress(directory, **options)
    assert "\n" not in str(error.value)


def test_a_model_that_cannot_be_compressed_in_memory_is_refused():
    with pytest.raises(InputError, match="mixture of experts; give the directory"):
        winnow.compress(pico("mixtral"), WINDOWS, "svd")


def test_importing_the_package_imports_neither_torch_nor_transformers():
    code = "import sys, winnow; first = {'torch', 'transformers', 'pandas'} & set(sys.modules); winnow.compress; "
    code += "assert not first; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        winnow.nothing  # noqa: B018


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("targets", [["attention"], ["ffn", "attention"]])
def test_a_mixture_by_its_directory_also_exports_as_a_dense_model(tmp_path, family, targets):
    """In a folder with other models, whose files are no evaluations of the checkpoint."""
    pico(family).save_pretrained(tmp_path / "model")
    many = torch.randint(0, 100, (16, 32), generator=torch.Generator().manual_seed(0))
    made = winnow.compress(tmp_path / "model", many, "svd", 0.6, targets=targets, nearest=True)
    made.save(tmp_path / "checkpoint")
    hand_on(tmp_path / "checkpoint", tmp_path / "dense", "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert_close(logits(dense), logits(made.model), atol=1e-5, rtol=1e-5)
