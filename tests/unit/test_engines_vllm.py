"""The parts of the plug-in for vLLM that need no vLLM: what is refused, where tensors go, and what its layers compute."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig

from tests.unit.test_checkpoint import built
from winnow.checkpoint.loading import load_model
from winnow.engines import vllm as plug_in
from winnow.engines.vllm.checked import check_directory, check_parallel, described
from winnow.engines.vllm.parts import END, Parts, Places, Tensors, joined
from winnow.engines.vllm.passing import SATURATED
from winnow.engines.vllm.rounded import MANY, PRODUCT, FewBits, suits
from winnow.errors import InputError
from winnow.numerics.modules import LowRankLinear, RoundedLinear
from winnow.numerics.rounding import packed

NAMES = {"llama": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), "gpt2": ("mlp.c_fc", "mlp.c_proj")}
LAYER = {"llama": "model.layers.1", "gpt2": "transformer.h.1"}


def read(checkpoint: Path) -> tuple:
    config = AutoConfig.from_pretrained(checkpoint)
    return config, json.loads((checkpoint / "config.json").read_text())["quantization_config"]


def run_of(checkpoint: Path, joined_names: list[list[str]]) -> list[Parts]:
    """The layers of an engine, which join these modules of a checkpoint, loaded as vLLM does: by names, one after the other."""
    found, tensors, places = described(*read(checkpoint)), Tensors(), Places()
    layers = {}
    for number, names in enumerate(joined_names):
        parts = {name: found.take(name) for name in names}
        for part in parts.values():
            tensors.allocate(part, torch.float32)
        layers[f"layer{number}"] = Parts(parts, tensors)
        places.add(f"layer{number}", names)
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        name, _ = places.rename_source_key(key)
        layer, _, rest = name.partition(".")
        if layer in layers:
            assert name.endswith(END)
            layers[layer].load_weights([(rest, tensor)])
    for layer in layers.values():
        layer.finish(lambda name, part: found.passing[name].around(part) if name in found.passing else part)
    return list(layers.values())


@pytest.mark.parametrize("kind", ["affine_block", "split_affine", "neuron_slice", "rounded", "gauge_fixed", "split"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_ffn_whose_gate_and_up_are_joined_has_the_outputs_of_the_checkpoint(saved, family, kind):
    checkpoint = built(saved(family), kind)
    model = load_model(checkpoint, "float32", "cpu")
    *inner, down = [f"{LAYER[family]}.{name}" for name in NAMES[family]]
    first, last = run_of(checkpoint, [inner, [down]])
    ffn = model.get_submodule(down.rpartition(".")[0])
    dense = load_model(saved(family), "float32", "cpu").get_submodule(down.rpartition(".")[0])
    activation = dense.act_fn if family == "llama" else dense.act
    x = torch.randn(5, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        h = first(x)
        if family == "llama":  # as vLLM's SiluAndMul
            gate, up = h.chunk(2, dim=-1)
            h = activation(gate) * up
        else:
            h = activation(h)
        found, expected, uncompressed = last(h), ffn(x[None])[0], dense(x[None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert float((expected - uncompressed).abs().max()) > 1e-3, "compressed, not the dense FFN"


@pytest.mark.parametrize("kind", ["shared_basis", "basis_sharing", "coupled"])
def test_what_matrices_share_exists_once(saved_llama, kind):
    checkpoint = built(saved_llama, kind)
    model = load_model(checkpoint, "float32", "cpu")
    names = [[f"model.layers.{i}.self_attn.{role}_proj" for role in "qkv"] for i in range(2)]
    layers = run_of(checkpoint, names)
    x = torch.randn(3, model.config.hidden_size)
    for layer, own in zip(layers, names, strict=True):
        expected = torch.cat([model.get_submodule(name)(x) for name in own], dim=-1)
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    held = {t.data_ptr(): t.numel() for layer in layers for t in layer.parameters()}
    stored = load_file(checkpoint / "model.safetensors")
    assert sum(held.values()) == sum(t.numel() for key, t in stored.items() if ".self_attn." in key and ".o_proj." not in key)
    if kind == "shared_basis":
        assert all(len(layer.parts) == 1 for layer in layers), "one product with the basis, one with all that it is shared by"


def test_neighbours_are_joined_and_others_are_not():
    torch.manual_seed(0)
    shared = [LowRankLinear(8, width, 2, bias=bias) for width, bias in ((4, True), (6, False))]
    shared[1].right = shared[0].right
    parts = [nn.Linear(8, 3), nn.Linear(8, 5, bias=False), *shared, LowRankLinear(8, 4, 2, bias=False)]
    x = torch.randn(2, 8)
    expected = torch.cat([part(x) for part in parts], dim=-1)
    found = joined(parts)
    assert [type(part) for part in found] == [nn.Linear, LowRankLinear, LowRankLinear]
    torch.testing.assert_close(torch.cat([part(x) for part in found], dim=-1), expected)


def test_a_missing_a_foreign_and_a_misshapen_tensor_are_named(saved_llama):
    found, tensors = described(*read(built(saved_llama, "low_rank"))), Tensors()
    name = "model.layers.0.mlp.down_proj"
    part = found.take(name)
    tensors.allocate(part, torch.float32)
    layer = Parts({name: part}, tensors)
    with pytest.raises(InputError, match=f"{name}.other, which the checkpoint's config does not describe"):
        layer.load_weights([("0.other.tensor", torch.zeros(1))])
    with pytest.raises(InputError, match=rf"{name}.left.weight has shape \[1\] in the files"):
        layer.load_weights([("0.left.weight.tensor", torch.zeros(1))])
    with pytest.raises(InputError, match=rf"{name}.right.weight: missing from the weights"):
        layer.load_weights([("0.left.weight.tensor", torch.zeros_like(part.left.weight))])
        layer.finish(lambda name, part: part)


def test_only_tensors_of_compressed_modules_get_other_names():
    places = Places()
    places.add("model.layers.1.mlp.gate_up_proj", ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"])
    new, _ = places.rename_source_key("model.layers.1.mlp.up_proj.left.weight")
    assert new == "model.layers.1.mlp.gate_up_proj.1.left.weight.tensor"
    assert places.rename_source_key(new.removeprefix("model."))[0] == new.removeprefix("model."), "a second time it is as it is"
    for other in ("model.layers.11.mlp.up_proj.weight", "lm_head.weight", "model.layers.1.mlp.up_projection.weight"):
        assert places.rename_source_key(other) == (other, None)
    assert places.missing(["model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"]) == ["model.layers.2.mlp.up_proj"]


def test_what_vllm_cannot_run_is_refused_in_one_line(saved, saved_llama):
    config, quantization = read(built(saved_llama, "low_rank"))
    newer = {**quantization, "format_version": 99}
    unknown = {**quantization, "layers": {"model.layers.0.mlp.up_proj": {"kind": "no_such"}}}
    refused = [
        (config, newer, "format 99, but this installation reads formats"),
        (config, unknown, "structure 'no_such', which this version of winnow lacks"),
        (*read(built(saved("gpt_neox"), "low_rank")), "does not know the family 'gpt_neox', only gemma2, .*winnow export"),
        (*read(built(saved("phi3"), "affine_block")), "activation_fn: vLLM cannot run affine_block where gate and up are one"),
    ]
    for model, content, message in refused:
        with pytest.raises(InputError, match=message) as raised:
            described(model, content)
        assert "\n" not in str(raised.value)
    affine, content = read(built(saved_llama, "affine_block"))
    affine.hidden_act = "sigmoid"
    with pytest.raises(InputError, match=r"layers.0.mlp.act_fn: vLLM cannot run affine_block with the activation Sigmoid"):
        described(affine, content)
    config.architectures = ["LlamaForSequenceClassification"]
    with pytest.raises(InputError, match="runs causal language models, not LlamaForSequenceClassification"):
        described(config, quantization)
    for sizes, what in (((2, 1), "tensor"), ((1, 4), "pipeline")):
        with pytest.raises(InputError, match=f"{what}_parallel_size is {max(sizes)}; set it to 1"):
            check_parallel(*sizes)
    check_parallel(1, 1)


def test_files_are_compared_before_anything_is_loaded(saved_llama, tmp_path):
    checkpoint = built(saved_llama, "low_rank")
    check_directory(described(*read(checkpoint)), checkpoint)
    with pytest.raises(InputError, match=r"down_proj.weight has shape .* the config says \[0\]"):
        check_directory(described(*read(checkpoint)), saved_llama)


def rounded(outputs: int, inputs: int, bits: int, group: int, zeros: bool) -> RoundedLinear:
    generator, limit, groups = torch.Generator().manual_seed(bits), 2 ** (bits - 1), -(-inputs // group)
    module = RoundedLinear(inputs, outputs, bits, group, bias=True, zeros=zeros)
    module.steps = packed(torch.randint(-limit, limit, (outputs, inputs), generator=generator).float(), bits)
    module.scale = (torch.rand(outputs, groups, generator=generator) * 0.1).half().view(torch.int16)
    if zeros:
        module.zero = packed(torch.randint(-limit, limit, (outputs, groups), generator=generator).float(), bits)
    nn.init.normal_(module.bias, generator=generator)
    return module.requires_grad_(False)


@pytest.mark.skipif(PRODUCT is None, reason="this torch has no 4-bit kernel for CPUs")
@pytest.mark.parametrize("tokens", [1, 3, MANY])
@pytest.mark.parametrize(
    ("outputs", "inputs", "bits", "group", "zeros"), [(80, 100, 6, 32, False), (64, 128, 3, 64, True), (352, 96, 8, 32, False)]
)
def test_few_bits_multiply_as_the_numbers_of_the_checkpoint(outputs, inputs, bits, group, zeros, tokens):
    module = rounded(outputs, inputs, bits, group, zeros)
    assert suits(module, torch.bfloat16)
    assert not suits(module, torch.float32)
    module.add(torch.randn(2, inputs).bfloat16() / 8, torch.randn(outputs, 2).bfloat16())  # as a recovery adds
    few = FewBits(module)
    x = torch.randn(tokens, inputs, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        found, expected = few(x).float(), nn.functional.linear(x.float(), module.matrix(), module.bias)
        expected += module.added(x).float()
    assert float((found - expected).norm() / expected.norm()) < 5e-3
    assert found.shape == (tokens, outputs)
    held = sum(tensor.nbytes for tensor in few.buffers())
    rows, columns = outputs + -outputs % 64, inputs + -inputs % group
    assert held == rows * columns * (1 if bits > 4 else 0.5) + (2 if bits > 4 else 1) * rows * columns // group * 4


def test_the_divided_channels_are_exact_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        full = torch.full((1,), SATURATED, dtype=dtype)
        x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
        assert torch.equal(nn.functional.silu(full), full)
        if dtype != torch.float16:  # whose smallest numbers have fewer digits
            assert torch.equal(full * (x / SATURATED), x)


def test_with_another_vllm_the_plug_in_warns_and_lets_other_models_run(caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.delitem(sys.modules, "winnow.engines.vllm.config", raising=False)
    plug_in.register()
    assert "vLLM runs no compressed checkpoint: No module named 'vllm.config'" in caplog.text
