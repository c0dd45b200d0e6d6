"""LoRA of peft on checkpoints of every structure: the usual calls, and a merge that is exact or refused."""

import json
import warnings
from functools import cache
from pathlib import Path

import peft
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import pico
from tests.pages import blocks
from tests.unit.test_checkpoint import IDS, build, logits, targets_of
from tests.unit.worlds import FITTED
from winnow.checkpoint.export import export_dense
from winnow.errors import InputError
from winnow.numerics.modules import Constant

NAMES = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "mixtral": ["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"],
}
FEW = {"sweeps": 2, "starts": 1}
SHARED = [("shared_basis", {}), ("basis_sharing", {}), ("coupled", {"tying": "tied", **FEW})]  # factors of several matrices
VARIANTS = [
    *((kind, FEW if kind == "coupled" else {}) for kind in FITTED),
    *SHARED[2:],
    ("coupled", {"tying": "tied", "sides": "one", **FEW}),
    ("bypass", {"remainder": {"kind": "shared_basis"}}),
    ("cluster", {"axis": "rows", "by": "cosine"}),
    ("split", {"exact": 0.0}),
    ("split_affine", {"light": "dropped"}),
]
MIXED = {"attention": {"kind": "shared_basis"}, "ffn": {"kind": "gauge_fixed"}}
TIGHT = {"atol": 1e-5, "rtol": 0}

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@cache
def source_of(folder: Path, family: str) -> Path:
    pico(family).save_pretrained(folder / family)
    return folder / family


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("lora")


def loaded(checkpoint: Path):
    return AutoModelForCausalLM.from_pretrained(checkpoint).eval()


def adapted(checkpoint: Path, targets, scale: float = 0.2, **options):
    """A checkpoint with random adapters."""
    model = get_peft_model(loaded(checkpoint), LoraConfig(r=4, lora_alpha=7, target_modules=targets, **options)).eval()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model


def places(model) -> set[str]:
    return {name.partition(".lora_A")[0] for name, _ in model.named_parameters() if ".lora_A" in name}


@pytest.mark.parametrize(
    ("family", "kind", "options"),
    [
        *(("llama", *variant) for variant in VARIANTS),
        *(("gpt2", kind, {}) for kind in ("low_rank", "shared_basis", "neuron_slice", "rounded")),
        ("mixtral", "low_rank", {}),
    ],
)
def test_the_usual_calls_train_save_and_merge_exactly(folder, tmp_path, family, kind, options):
    checkpoint = build(source_of(folder, family), tmp_path, targets_of(kind), 0.6, kind, **options)
    plain = loaded(checkpoint)
    model = adapted(checkpoint, "all-linear")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gates that are constants
        assert places(adapted(checkpoint, NAMES[family])) == places(model), "the names of the dense model mean the same"
        assert places(adapted(checkpoint, rf".*\.({'|'.join(NAMES[family])}).*")) == places(model), "and a pattern of them"
    modules = dict(plain.named_modules())
    own = [name.removeprefix("base_model.model.") for name in places(model)]
    whole = [name for name in modules if name.rpartition(".")[2] in NAMES[family]]
    assert sorted(own) == sorted(name for name in whole if not isinstance(modules[name], Constant)), "each matrix, as one"

    before = logits(model)
    assert float((before - logits(plain)).abs().max()) > 0.1
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(loaded(checkpoint), tmp_path / "adapter").eval()), before)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    loss = model(input_ids=IDS, labels=IDS).loss
    gradients = torch.autograd.grad(loss, trained)
    assert all(bool(gradient.any()) for gradient in gradients)
    assert {id(p) for p in trained} == {id(p) for name, p in model.named_parameters() if ".lora_" in name}

    model.merge_adapter()
    torch.testing.assert_close(logits(model), before, **TIGHT)
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model), before, **TIGHT)
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(logits(merged), before, **TIGHT)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(loaded(tmp_path / "merged")), before, **TIGHT)


@pytest.mark.parametrize(("kind", "options"), [("by_target", {"parts": MIXED}), ("rounded", {"bits": [3]})])
def test_what_is_merged_is_a_map_beside_what_is_stored(folder, tmp_path, kind, options):
    """Nothing that was stored changes, in any form; a second adapter adds to the first, and the dense export has both."""
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn", "attention"], 0.6, kind, **options)
    model = adapted(checkpoint, "all-linear", lora_dropout=0.1)
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], use_rslora=True))
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".other." in name:
            parameter.data.fill_(0.05)
    model.eval()
    before = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    one, other = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "merged"))
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    assert {name.rpartition("_proj.")[2] for name in other.keys() - one.keys()} == {
        "added.left.weight",
        "added.right.weight",
        "added.weight",
    }
    layers = json.loads((tmp_path / "merged" / "config.json").read_text())["quantization_config"]["layers"]
    added = {name: layout["added"] for name, layout in layers.items()}
    assert added == {name: 6 if name.endswith(("q_proj", "down_proj")) else 4 for name in layers}
    again = adapted(tmp_path / "merged", ["q_proj"])
    after = logits(again)
    twice = again.merge_and_unload()
    torch.testing.assert_close(logits(twice), after, **TIGHT)
    assert twice.get_submodule("model.layers.0.self_attn.q_proj").added.right.out_features == 10
    export_dense(tmp_path / "merged", tmp_path / "dense", {})
    torch.testing.assert_close(logits(loaded(tmp_path / "dense")), before, **TIGHT)


def test_the_lines_of_the_documentation_run(folder, tmp_path, monkeypatch):
    """On the preset `grc_whitened`'s structure, whose factors are shared; what is merged has the adapted model's logits."""
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn", "attention"], 0.6, "shared_basis")
    (code,) = blocks("import winnow\nfrom peft")
    trained = "for name, p in model.named_parameters(): p.data += 0.1 * ('.lora_B' in name)\n"
    assert "...  # train\n" in code
    monkeypatch.chdir(tmp_path)
    found: dict = {}
    exec(code.replace("...  # train\n", trained), found)
    after, again = logits(loaded(tmp_path / "merged")), logits(found["again"].eval())
    torch.testing.assert_close(after, again, **TIGHT)
    assert float((after - logits(loaded(checkpoint))).abs().max()) > 0.01


@pytest.mark.parametrize(("kind", "options"), SHARED)
def test_a_merge_into_a_factor_that_others_share_is_refused_in_one_line(folder, tmp_path, kind, options):
    """An adapter by the factor's name is for one matrix; merged into the tensor, it was for all, or two were in one."""
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["attention"], 0.6, kind, **options)
    for config in (
        LoraConfig(r=2, target_modules=["left", "right"], init_lora_weights=False),
        LoHaConfig(r=2, target_modules="all-linear", init_weights=False),
    ):
        model = get_peft_model(loaded(checkpoint), config).eval()
        before = logits(model)
        for merge in (model.merge_and_unload, model.merge_adapter):
            with pytest.raises(InputError, match=r"_proj\.(left|right): .*shares this factor.*'all-linear' in `target_") as error:
                merge()
            assert "\n" not in str(error.value)
        assert torch.equal(logits(model), before), "as it was"


def test_a_factor_of_one_matrix_can_be_adapted_and_merged(folder, tmp_path):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6)
    model = adapted(checkpoint, ["left", "right"])
    assert len(places(model)) == 2 * 2 * 3
    before = logits(model)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), before, **TIGHT)
    assert not any(getattr(module, "added", None) for module in merged.modules())
    assert sum(p.numel() for p in merged.parameters()) == sum(p.numel() for p in loaded(checkpoint).parameters())


def test_an_adapter_of_the_dense_model_fits_the_compressed_one(folder, tmp_path):
    source = source_of(folder, "llama")
    adapted(source, NAMES["llama"]).save_pretrained(tmp_path / "adapter")
    checkpoint = build(source, tmp_path / "work", ["ffn", "attention"], 0.6, "shared_basis")
    model = PeftModel.from_pretrained(loaded(checkpoint), tmp_path / "adapter").eval()
    same = adapted(checkpoint, NAMES["llama"])
    assert torch.equal(logits(model), logits(same))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"layers\.0\.mlp\.\w+_proj: use_dora needs a dense weight"),
        ({"lora_bias": True}, "lora_bias needs a dense weight"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights='pissa' needs a dense weight.*`python -m winnow export` writes"),
    ],
)
def test_what_needs_the_dense_weight_is_refused_by_name(folder, tmp_path, options, message):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6)
    with pytest.raises(InputError, match=message):
        get_peft_model(loaded(checkpoint), LoraConfig(target_modules="all-linear", **options))


def test_a_gate_that_is_a_constant_is_named_and_left(folder, tmp_path):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6, "affine_block")
    with pytest.warns(
        UserWarning, match=r"model\.layers\.0\.mlp\.gate_proj: no adapter, since compression has merged this matrix"
    ):
        adapted(checkpoint, ["gate_proj", "up_proj"])


def test_adapters_that_are_not_finite_are_found_by_a_safe_merge(folder, tmp_path):
    model = adapted(build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6), ["up_proj"])
    next(p for name, p in model.named_parameters() if ".lora_B" in name).data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the adapter default is not finite"):
        model.merge_and_unload(safe_merge=True)


def test_an_older_peft_is_told(folder, tmp_path, monkeypatch):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6)
    monkeypatch.setattr(peft, "__version__", "0.18.1")
    with pytest.raises(InputError, match=r"needs peft 0\.21 or newer, this is 0\.18\.1: upgrade peft"):
        adapted(checkpoint, "all-linear")
    assert places(adapted(source_of(folder, "llama"), "all-linear")), "dense models are peft's own"


def test_more_ranks_than_a_layout_can_have_are_not_merged(folder, tmp_path):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6)
    model = get_peft_model(loaded(checkpoint), LoraConfig(r=161, target_modules=["up_proj"]))
    with pytest.raises(InputError, match=r"layers\.0\.mlp\.up_proj: with this adapter the merged rank is 161, more than 160"):
        model.merge_and_unload()


@pytest.mark.parametrize("added", [-1, 10**9, [4], "4", 2.5])
def test_a_layout_cannot_ask_for_more_than_the_matrix(folder, tmp_path, added):
    checkpoint = build(source_of(folder, "llama"), tmp_path, ["ffn"], 0.6)
    config = json.loads((checkpoint / "config.json").read_text())
    next(iter(config["quantization_config"]["layers"].values()))["added"] = added
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the layout of .* does not fit the model"):
        loaded(checkpoint)
