"""Products of a few tokens with rounded matrices: the kernel computes what multiplying out does, within bfloat16's rounding."""

import copy

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import winnow
from tests.conftest import pico
from winnow.evaluation.latency import Generation, weight_bytes
from winnow.numerics import kernels, modules
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import packed

IN, OUT = 256, 96
X = torch.randn(2, 3, IN, generator=torch.Generator().manual_seed(0)).bfloat16()


def layer(bits=4, group=64, zeros=False, inputs=IN, outputs=OUT) -> RoundedLinear:
    draw = torch.Generator().manual_seed(bits)
    made, half = RoundedLinear(inputs, outputs, bits, group, True, zeros), 2 ** (bits - 1)
    groups = made.scale.shape[1]
    made.steps.copy_(packed(torch.randint(-half, half, (outputs, inputs), generator=draw), bits))
    made.scale.copy_((torch.randn(outputs, groups, generator=draw) / 100).half().view(torch.int16))
    if zeros:
        made.zero.copy_(packed(torch.randint(-half, half, (outputs, groups), generator=draw), bits))
    made.bias.data = torch.randn(outputs, generator=draw)
    return made.bfloat16().requires_grad_(False)


def multiplied_out(made: RoundedLinear, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(x, made.matrix().to(x.dtype), made.bias)


@pytest.mark.parametrize("inputs", [IN, 160])  # the last group of 160 inputs is smaller
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_all_bits_within_twice_the_rounding_of_multiplying_out(bits, zeros, inputs):
    made, x = layer(bits, zeros=zeros, inputs=inputs), X[..., :inputs]
    exact = x.double() @ made.matrix().double().T + made.bias.double()
    y = made(x)
    assert made.planes is not None, "the kernel was used"
    assert y.shape == (2, 3, OUT)
    assert y.dtype == torch.bfloat16
    own, other = (float((found.double() - exact).norm() / exact.norm()) for found in (y, multiplied_out(made, x)))
    assert own <= 2 * other
    assert own < 0.005


@pytest.mark.parametrize(
    ("made", "x"),
    [
        (layer(), X.float()),  # no kernel that is faster
        (layer(), X.half()),
        (layer(), torch.cat([X] * 11, 1)),  # 66 tokens
        (layer(group=48), X),
        (layer(group=16), X),
        (layer(outputs=90), X),
    ],
    ids=["float32", "float16", "many", "group", "small group", "outputs"],
)
def test_elsewhere_it_is_multiplied_out_to_the_last_bit(made, x):
    if x.dtype != torch.bfloat16:
        made = made.to(x.dtype)
    assert torch.equal(made(x), multiplied_out(made, x))
    assert made.planes is None


def test_gradients_flow_through_what_is_multiplied_out():
    made, x = layer(), X.clone().requires_grad_()
    made(x).sum().backward()
    assert made.planes is None
    assert_close(x.grad[0, 0], made.matrix().sum(0).bfloat16(), rtol=0.05, atol=0.01)


def test_changed_numbers_are_seen():
    made, other = layer(), layer()
    before = made(X)
    made.scale.copy_((2 * other.scale.view(torch.float16)).view(torch.int16))
    assert_close(made(X) - made.bias, 2 * (before - made.bias), rtol=0.02, atol=0.02)
    made.load_state_dict(other.state_dict())
    assert torch.equal(made(X), before)
    assert copy.deepcopy(made)(X).equal(before)


def test_numbers_loaded_in_inference_mode_and_compiled_code_are_multiplied_out():
    with torch.inference_mode():
        made = layer()
        assert torch.equal(made(X), multiplied_out(made, X))
    assert made.planes is None
    other = layer()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(X), multiplied_out(other, X))
    assert other.planes is None


def test_the_kernels_numbers_are_not_saved():
    made = layer()
    made(X)
    assert made.planes is not None
    assert {*made.state_dict()} == {"weight", "steps", "scale", "bias"}


def test_a_version_of_torch_without_the_kernel_multiplies_out(monkeypatch):
    monkeypatch.setattr(kernels, "PRODUCT", None)
    made = layer()
    assert torch.equal(made(X), multiplied_out(made, X))


def test_a_decoded_token_reads_fewer_bytes_and_is_counted():
    """Of a whole model, with what the kernel prepares made before anything is counted."""
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    dense = pico("llama").bfloat16().eval()
    method = {"structure": {"kind": "rounded", "bits": [4], "group": 32}, "metric": {"kind": "weights"}}
    made = winnow.compress(dense, ids, method, 0.6, nearest=True).model
    with torch.no_grad():
        own, other = (Generation(model, ids[:, :30], ids[:, :9]).resources(1e9) for model in (made, dense))
    block = sum(p.numel() for p in dense.model.layers.parameters() if p.dim() == 2)
    saved = other["decode"]["weight_bytes"] - own["decode"]["weight_bytes"]
    assert saved == pytest.approx(1.5 * block - 4 * block / 32, rel=0.05), "half a byte and two scales in 32, of two bytes"
    assert own["decode"]["flops"] >= other["decode"]["flops"]
    assert own["decode"]["floor_seconds"] == pytest.approx(own["decode"]["weight_bytes"] / 1e9)


@pytest.mark.parametrize("outputs", [16, 64, 96, 208])  # whole blocks of the kernel and a part of one
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", range(2, 9))
def test_a_released_matrix_takes_memory_once_and_stays_the_same(bits, zeros, outputs):
    made, kept = layer(bits, zeros=zeros, inputs=160, outputs=outputs), layer(bits, zeros=zeros, inputs=160, outputs=outputs)
    assert made.release()
    assert made.release(), "again"
    assert made.steps.numel() == 0
    assert torch.equal(made.matrix(), kept.matrix())
    for x in (X[..., :160], torch.cat([X] * 11, 1)[..., :160], X[..., :160].float()):
        if x.dtype == torch.float32:
            made, kept = made.float(), kept.float()
        assert torch.equal(made(x), kept(x))
    state = made.state_dict()
    assert state.keys() == kept.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in kept.state_dict().items())
    assert torch.equal(copy.deepcopy(made).bfloat16()(X[..., :160]), kept.bfloat16()(X[..., :160]))


def test_a_released_matrix_is_used_in_inference_mode():
    with torch.inference_mode():
        made = layer()
        made.release()
        made.planes.product, kernel = None, made.planes.product
        with pytest.raises(TypeError, match="not callable"):
            made(X)
        made.planes.product = kernel
        assert torch.equal(made(X), layer()(X)) is False, "the other is multiplied out"


def test_what_the_kernel_lacks_is_not_released(monkeypatch):
    made = layer(group=48)
    assert not made.release()
    assert made.steps.numel()
    monkeypatch.setattr(kernels, "PACK", lambda codes, _: torch.zeros(codes.shape[0], codes.shape[1] // 2, dtype=torch.uint8))
    kernels.order.cache_clear()
    kernels.layout.cache_clear()
    assert kernels.layout() is None, "of another layout"
    other = layer()
    assert not other.release()
    kernels.order.cache_clear()
    kernels.layout.cache_clear()


def test_for_inference_halves_what_is_held_and_saves_the_same_checkpoint(tmp_path):
    ids = torch.randint(0, 100, (1, 40), generator=torch.Generator().manual_seed(0))
    method = {"structure": {"kind": "rounded", "bits": [4], "group": 32}, "metric": {"kind": "weights"}}
    winnow.compress(pico("llama").bfloat16().eval(), ids, method, 0.6, nearest=True).save(tmp_path / "made")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="bfloat16").train()
    with torch.no_grad():
        made(ids[:, :8])
        used, plain = weight_bytes(made), made(ids).logits
        assert winnow.for_inference(made) is made
        assert not made.training
        codes = sum(p.numel() // 2 for p in pico("llama").model.layers.parameters() if p.dim() == 2)
        assert used - weight_bytes(made) == codes
        assert torch.equal(made(ids).logits, plain)
        made.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="bfloat16")
        assert torch.equal(again(ids).logits, plain)
    slow = winnow.for_inference(again.float())
    assert not any(m.released for m in slow.modules() if isinstance(m, modules.RoundedLinear)), "no kernel in float32"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bits", [3, 8])
def test_large_matrices_are_multiplied_out_by_rows(monkeypatch, bits, tokens, dtype):
    monkeypatch.setattr(modules, "AT_ONCE", 64 * IN)
    made = layer(bits, group=48, zeros=True, outputs=208).to(dtype)
    x = torch.randn(tokens, IN, generator=torch.Generator().manual_seed(1)).to(dtype)
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert_close(made(x), multiplied_out(made, x), rtol=tolerance, atol=tolerance)
    assert torch.equal(made(x.requires_grad_()), multiplied_out(made, x)), "at once for gradients"
