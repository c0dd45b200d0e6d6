"""The configurations of 8B and 70B models: what they run, and whether it fits the machines that they are for."""

import math

import pytest
import yaml

from tests.conftest import ROOT
from winnow.models.architectures import matrices_of, outer_of
from winnow.models.shape import Shape
from winnow.planning.config import load
from winnow.planning.forecast import at_peak, forecast
from winnow.planning.load import Work
from winnow.planning.plan import Plan
from winnow.planning.rates import DEVICES

GIB, VOCABULARY = 2**30, 128256
# (layers, width, FFN, heads, heads of keys and values; GiB of the device; most of the intermediates, in bytes of the model)
MODELS = {"llama-3.1-8b": (32, 4096, 14336, 32, 8, 24, 4.0), "llama-3.1-70b": (80, 8192, 28672, 64, 8, 80, 4.15)}


def llama(layers: int, d: int, f: int, heads: int, keys: int) -> Shape:
    """The shape of a model of this size, in 16 bits, as its headers say it."""
    k = d // heads * keys
    tensors: dict = {"model.embed_tokens.weight": (VOCABULARY, d), "lm_head.weight": (VOCABULARY, d), "model.norm.weight": (d,)}
    for prefix in (f"model.layers.{layer}." for layer in range(layers)):
        tensors |= {f"{prefix}self_attn.{name}_proj.weight": (n, d) for name, n in {"q": d, "k": k, "v": k, "o": d}.items()}
        tensors |= {f"{prefix}mlp.{name}_proj.weight": (f, d) for name in ("gate", "up")}
        tensors |= {f"{prefix}mlp.down_proj.weight": (d, f)}
        tensors |= {f"{prefix}{name}_layernorm.weight": (d,) for name in ("input", "post_attention")}
    found = {name: {"shape": list(shape)} for name, shape in tensors.items()}
    numbers = sum(map(math.prod, tensors.values()))
    return Shape(matrices_of("llama", found), outer_of("llama", found, {}), numbers, 2 * numbers, 2, VOCABULARY, d, layers)


@pytest.fixture(scope="module", params=MODELS)
def planned(request) -> tuple[str, Plan, Shape, dict[str, Work]]:
    name = request.param
    plan = Plan(load(yaml.safe_load((ROOT / "config" / "models" / f"{name}.yaml").read_text())), ROOT)
    shape = llama(*MODELS[name][:5])
    return name, plan, shape, {work.stage: work for work in forecast(plan, {name: shape}) if not work.target}


def test_the_recommended_preset_is_what_they_run(planned):
    _, plan, _, works = planned
    assert {(cell.method, plan.budget_name(cell.budget)) for cell in plan.cells if cell.budget} == {("winnow", "all-0.25")}
    assert len(plan.cells) == 2
    assert {"collect_gradients", "factorize", "predict_losses", "compress_refitted", "evaluate_perplexity"} <= set(works)


def test_every_job_fits_the_device_and_the_host(planned):
    name, _, shape, works = planned
    device, most = MODELS[name][5:]
    assert {stage: work.memory / GIB for stage, work in works.items() if work.memory > device * GIB} == {}
    assert all((work.memory if work.host is None else work.host) < 64 * GIB for work in works.values())
    assert works["collect_statistics"].host > shape.bytes / shape.layers, "a block of the model"
    kept = sum(work.disk for work in works.values() if work.intermediate)
    assert kept < most * shape.bytes
    assert at_peak(works.values()) > kept + works["compress_refitted"].disk


def test_an_h200_takes_minutes_for_the_passes_and_longer_for_rounding(planned):
    """Of the seconds of factors, most are of short calls, of which a faster device makes no more."""
    *_, works = planned
    statistics, factors = works["collect_statistics"].amounts, works["factorize"].amounts
    assert statistics.products == statistics.decompositions == statistics.calls == 0 < statistics.half
    h200 = DEVICES["h200"]
    assert factors.calls / h200.calls > 0.5 * h200.seconds(factors)
