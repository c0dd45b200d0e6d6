"""Products of a few tokens with rounded matrices: the kernel computes what multiplying out does, within bfloat16's rounding."""

import copy

import pytest
import torch
from torch.testing import assert_close

import winnow
from tests.conftest import pico
from winnow.evaluation.latency import Generation
from winnow.numerics import kernels
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
        (layer(), torch.cat([X, X, X], 1)),  # 18 tokens
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
        own, other = (Generation(model, ids[:, :30], ids[:, :9]).resources() for model in (made, dense))
    block = sum(p.numel() for p in dense.model.layers.parameters() if p.dim() == 2)
    saved = other["decode"]["weight_bytes"] - own["decode"]["weight_bytes"]
    assert saved == pytest.approx(1.5 * block - 4 * block / 32, rel=0.05), "half a byte and two scales in 32, of two bytes"
    assert own["decode"]["flops"] >= other["decode"]["flops"]
