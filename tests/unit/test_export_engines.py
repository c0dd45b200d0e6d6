"""The export to compressed-tensors: the same numbers without winnow, what the format stores, and refusals by name."""

import json
import re
import subprocess
import sys
from functools import partial
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.pages import documented
from tests.unit import exports, test_checkpoint
from tests.unit.test_checkpoint import IDS, build, logits
from winnow.__main__ import main
from winnow.checkpoint.export import Checkpoint
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.packed import (
    READS,
    Scheme,
    export_packed,
    in_scheme,
    joined_by_vllm,
    not_in_vllm,
    packed_tensors,
    scheme_of,
    schemes_of,
)
from winnow.errors import InputError
from winnow.io.artifacts import Bundle
from winnow.numerics.grids import Form
from winnow.numerics.modules import RoundedLinear
from winnow.numerics.rounding import packed

ALL = ["ffn", "attention"]
ELSEWHERE = """
import sys
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
ids, found = torch.tensor({ids}), {{}}
for path in sys.argv[2:]:
    for dtype in ("float16", "float32"):
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        assert not any(report.values()), report
        with torch.no_grad():
            found[f"{{path}} {{dtype}}"] = model.eval()(input_ids=ids).logits
    found[f"{{path}} tokens"] = model.generate(ids, max_new_tokens=5, do_sample=False)
assert "winnow" not in sys.modules and "compressed_tensors" in sys.modules
save_file(found, sys.argv[1])
"""

refused = partial(exports.refused, form="compressed-tensors")


def elsewhere(folders: list[Path], out: Path) -> dict[str, torch.Tensor]:
    """Logits in two dtypes and generated tokens of model directories, in a process without winnow."""
    command = [sys.executable, "-c", ELSEWHERE.format(ids=IDS.tolist()), str(out), *map(str, folders)]
    subprocess.run(command, check=True, env={"HF_HUB_OFFLINE": "1", "PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
    return load_file(out)


def rounded(source: Path, work: Path, **options) -> Path:
    return build(source, work, ALL, 0.6, "rounded", **options)


def test_logits_and_tokens_without_winnow_are_those_of_the_checkpoint(saved, tmp_path):
    """Without biases and with; both widths; groups and whole rows; scales with signs, and zero points."""
    made = {}
    grids = [(4, "full"), (8, "full"), (3, "asymmetric"), (4, "asymmetric")]
    for family, (bits, grid), group in product(["llama", "opt"], grids, [32, None]):
        work = tmp_path / f"{family} {bits} {group} {grid}"
        checkpoint = rounded(saved(family), work, bits=[bits], group=group, grids=[grid])
        assert export_packed(checkpoint, work / "packed", None).error == 0
        made[work / "packed"] = checkpoint
    found = elsewhere(list(made), tmp_path / "found.safetensors")
    for out, checkpoint in made.items():
        for dtype in ("float32", "float16"):
            assert torch.equal(found[f"{out} {dtype}"], logits(load_model(checkpoint, dtype, "cpu"))), (out, dtype)
        generated = load_model(checkpoint, "float32", "cpu").generate(IDS, max_new_tokens=5, do_sample=False)
        assert torch.equal(found[f"{out} tokens"], generated)


GRIDS = ("symmetric", "full", "asymmetric")
WAYS = [way for way in product(range(2, 9), GRIDS) if way != (8, "asymmetric")]


def random_module(bits: int, grid: str, group: int, columns: int = 96) -> RoundedLinear:
    """All codes of the grid at random, with scales of both signs if it has them."""
    draws, form = torch.Generator().manual_seed(bits), Form(bits, grid, group)
    module = RoundedLinear(columns, 12, bits, group, False, grid == "asymmetric")
    low, high = form.codes
    module.steps = packed(torch.randint(low, high + 1, (12, columns), generator=draws) - form.offset, bits)
    scales = torch.rand(12, -(-columns // group), generator=draws).half()
    if grid == "full":
        scales *= torch.randint(0, 2, scales.shape, generator=draws) * 2 - 1
    module.scale = scales.view(torch.int16)
    if grid == "asymmetric":
        module.zero = packed(torch.randint(low, high + 1, scales.shape, generator=draws) - form.offset, bits)
    return module


@pytest.mark.parametrize("group", [32, 64, 96])
@pytest.mark.parametrize(("bits", "grid"), WAYS)
def test_the_format_stores_every_grid_exactly(bits, grid, group):
    """As the package itself reads it; 64 does not divide a row of 96 inputs, and is split."""
    module = random_module(bits, grid, group)
    scheme = Scheme(4 if bits + (grid == "asymmetric") <= 4 else 8, {32: 32, 64: 32, 96: None}[group])
    tensors = packed_tensors(*in_scheme(module, scheme), scheme)
    assert tensors["weight_packed"].nbytes == 12 * 96 * scheme.bits // 8
    assert tensors["weight_scale"].dtype == torch.float16
    record = QuantizationScheme(**scheme.record(["Linear"]))
    for dtype in (torch.float32, torch.float16):
        read = PackedQuantizationCompressor.decompress({**tensors, "weight_scale": tensors["weight_scale"].to(dtype)}, record)
        assert torch.equal(read["weight"], module.matrix().to(dtype))


def chosen(saved_llama, work: Path, monkeypatch, bits_of: dict[str, int | None], **options) -> Path:
    """A checkpoint in which every matrix has the bits of its role; None: it stays dense."""
    bits = sorted({bits for bits in bits_of.values() if bits})

    def sizes(groups, budget):
        found = {g.name: bits_of[g.name.partition(".")[2]] for g in groups}
        return SimpleNamespace(sizes={name: bits.index(of) + 1 if of else None for name, of in found.items()})

    monkeypatch.setattr(test_checkpoint, "allocate", sizes)
    return rounded(saved_llama, work, bits=bits, **options)


BITS: dict[str, int | None] = {
    "q_proj": 3,
    "k_proj": 8,
    "v_proj": 4,
    "o_proj": 2,
    "gate_proj": 5,
    "up_proj": 6,
    "down_proj": None,
}


def test_bits_differ_by_matrix_and_some_matrices_are_dense(saved_llama, tmp_path, monkeypatch):
    checkpoint = chosen(saved_llama, tmp_path, monkeypatch, BITS)
    made = export_packed(checkpoint, tmp_path / "packed", None)
    assert made.engine == READS
    config = json.loads((tmp_path / "packed" / "config.json").read_text())
    assert config["dtype"] == made.dtype == "float32"
    groups = config["quantization_config"]["config_groups"].values()
    widths = {name: group["weights"]["num_bits"] for group in groups for name in group["targets"]}
    block, eight = "model.layers.1.", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert {name.removeprefix(block) for name, bits in widths.items() if bits == 8 and name.startswith(block)} == {
        *(f"self_attn.{role}" for role in eight[:3]),
        *(f"mlp.{role}" for role in eight[3:]),
    }, "q, k, v and gate, up have common widths"
    assert widths["model.layers.0.self_attn.o_proj"] == 4
    assert config["quantization_config"]["ignore"] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)] + ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(model), logits(load_model(checkpoint, "float32", "cpu")))
    stored = load_file(tmp_path / "packed" / "model.safetensors")
    assert made.bytes == sum(tensor.nbytes for tensor in stored.values())
    assert torch.equal(
        stored["model.layers.0.mlp.down_proj.weight"],
        load_file(checkpoint / "model.safetensors")["model.layers.0.mlp.down_proj.weight"],
    )


def test_what_vllm_does_not_read_is_said(saved_llama, tmp_path, monkeypatch):
    checkpoint = chosen(saved_llama, tmp_path / "dense k", monkeypatch, BITS | {"k_proj": None})
    made = export_packed(checkpoint, tmp_path / "packed", None)
    assert "it joins model.layers.0.self_attn.q_proj, model.layers.0.self_attn.k_proj" in made.engine
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert torch.equal(logits(model), logits(load_model(checkpoint, "float32", "cpu"))), "transformers does"
    joined = joined_by_vllm(Checkpoint(checkpoint).matrices())
    assert [len(names) for names in joined] == [3, 2, 3, 2]
    every = {name: Scheme(4, 32) for names in joined for name in names}
    assert not_in_vllm(every, joined) is None
    assert "has a scale for every 16 inputs" in not_in_vllm(every | {joined[0][1]: Scheme(4, 16)}, joined)


def test_refusals_name_the_module(saved, tmp_path, monkeypatch):
    checkpoint = build(saved("llama"), tmp_path / "low_rank", ["ffn"], 0.6)
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "model.layers.0.mlp.gate_proj (low_rank) cannot be exported to compressed-tensors: the format only has" in line
    checkpoint = rounded(saved("gpt2"), tmp_path / "gpt2", bits=[4])
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "transformer.h.0.attn.c_attn (rounded)" in line
    assert "it is a Conv1D in the dense model" in line
    checkpoint = rounded(saved("llama"), tmp_path / "group", bits=[4], group=40)
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert "self_attn.q_proj (rounded)" in line
    assert "groups of 40 do not divide its 64 inputs, only groups of 8 do" in line
    checkpoint = rounded(saved("llama"), tmp_path / "zeros", bits=[8], grids=["asymmetric"])
    assert "codes of 8 bits with zero points take 9 bits in it" in refused(
        tmp_path, checkpoint, monkeypatch, form="compressed-tensors"
    )
    assert "no quantization_config of winnow" in refused(tmp_path, saved("llama"), monkeypatch)


def test_an_adapter_beside_a_matrix_and_a_dense_model_are_refused(saved_llama, tmp_path):
    checkpoint = Checkpoint(rounded(saved_llama, tmp_path, bits=[4]))
    name = "model.layers.1.mlp.up_proj"
    assert scheme_of(checkpoint, name) == Scheme(4, 32)
    checkpoint.layouts[name]["added"] = 2
    with pytest.raises(InputError, match=rf"{name} \(rounded\) .*a merged adapter is stored beside it"):
        scheme_of(checkpoint, name)
    checkpoint.layouts = {}
    with pytest.raises(InputError, match="no matrix is compressed"):
        schemes_of(checkpoint, [])


def test_without_the_library_one_line_says_what_to_install(saved_llama, tmp_path, monkeypatch):
    checkpoint = rounded(saved_llama, tmp_path / "work", bits=[4])
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    monkeypatch.delitem(sys.modules, "winnow.checkpoint.packed")
    line = refused(tmp_path, checkpoint, monkeypatch)
    assert line == (
        "winnow: export: needs compressed_tensors, which is not installed; run `pip install '.[engines]'` in winnow's checkout"
    )


def test_the_documented_command_says_bytes_and_programs(saved_llama, tmp_path, monkeypatch, capsys):
    """Also what a narrow dtype costs."""
    checkpoint = rounded(saved_llama, tmp_path / "work", bits=[8])
    (command,) = documented("winnow export --format compressed-tensors")
    for out, options in (("exact", []), ("packed", ["--dtype", "bfloat16"])):
        places = {"<checkpoint>": str(checkpoint), "<new directory>": str(tmp_path / out)}
        words = re.split(r"(<[^>]+>)| ", command)
        monkeypatch.setattr(sys, "argv", [*(places.get(word, word) for word in words if word), *options])
        main()
    exact, said = capsys.readouterr().out.splitlines()
    assert "loaded in float32 with a relative rounding error of 0.0e+00" in exact
    manifest = Bundle(tmp_path / "packed" / "manifest.json").manifest
    assert f"packed: {manifest['model_stored_bytes']:,} bytes, loaded in bfloat16 with a relative rounding error of " in said
    assert f"transformers loads it with the package compressed-tensors, without winnow; {READS}; no results" in said
    stored, left = load_file(tmp_path / "packed" / "model.safetensors"), load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(stored[f"{name}.weight_scale"], left[f"{name}.scale"].view(torch.float16)), "scales keep their values"
    assert stored["model.embed_tokens.weight"].dtype == torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "packed").eval()
    assert model.dtype == torch.bfloat16
    found = logits(model)
    exact, lost, size = load_model(checkpoint, "float32", "cpu"), 0.0, 0.0
    for name, module in exact.named_modules():
        if isinstance(module, RoundedLinear):
            lost += float((model.get_submodule(name).weight.double() - module.matrix().double()).square().sum())
            size += float(module.matrix().double().square().sum())
    for name, tensor in left.items():
        if name.endswith(("norm.weight", "layernorm.weight", "embed_tokens.weight")):
            lost += float((tensor.bfloat16().double() - tensor.double()).square().sum())
            size += float(tensor.double().square().sum())
    assert manifest["rounding_error"] == pytest.approx((lost / size) ** 0.5, rel=1e-6)
    assert 5e-4 < manifest["rounding_error"] < 2**-8
    torch.testing.assert_close(found.float(), logits(exact), atol=0.02, rtol=0)
    text = (tmp_path / "packed" / "README.md").read_text()
    assert "# pico, compressed by winnow, in the format compressed-tensors" in text
    assert f"In bfloat16, this has a relative rounding\nerror of {manifest['rounding_error']:.1e};" in text
    assert f"{READS}." in text
