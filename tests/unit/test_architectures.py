"""Every architecture, from a tiny random config: exact at full rank, bytes, saving again, sharing, generation; as a table."""

import json
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from tests.conftest import TINY, pico
from tests.unit.test_checkpoint import IDS, build, statistics, targets_of
from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.data.tokens import check_causal
from winnow.errors import InputError
from winnow.io.artifacts import write_json
from winnow.models.classes import is_causal
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

FFN = ("split", "split_affine", "neuron_slice", "affine_block")
TARGETS = ["ffn", "attention"]


@pytest.fixture(scope="module", params=TINY)
def dense(request, tmp_path_factory):
    """A directory whose name says another family than its config."""
    other = "gpt2" if request.param != "gpt2" else "llama"
    folder = tmp_path_factory.mktemp("some models") / f"my {other}-7b (not it)"
    pico(request.param).save_pretrained(folder)
    return folder


def outputs(model) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a head."""
    with torch.no_grad():
        found = model(input_ids=IDS)
    return found.logits if "logits" in found else found.last_hidden_state


def stored(folder) -> dict[str, torch.Tensor]:
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def unique_bytes(model) -> int:
    """Bytes of the model's tensors, each counted once however many modules use it."""
    found = {t.data_ptr() if t.numel() else name: t.nbytes for name, t in model.state_dict(keep_vars=True).items()}
    return sum(found.values())


def test_full_rank_is_exact_and_saving_is_stable(dense, tmp_path, record_property):
    original = load_model(dense, "float32", "cpu")
    full = build(dense, tmp_path / "work", TARGETS, None)
    folder = shutil.copytree(full, tmp_path / "a name with spaces, and bert in it")
    model = load_model(folder, "float32", "cpu")
    assert type(model) is type(original)
    difference = float((outputs(model) - outputs(original)).abs().max())
    assert difference <= 1e-5

    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = stored(folder)
    assert manifest["model_stored_bytes"] == sum(t.nbytes for t in tensors.values()) == unique_bytes(model)
    numbers = sum(p.numel() for p in model.parameters())
    assert numbers * 4 == manifest["model_stored_bytes"]
    facts = ModelFiles(dense.parent / f"{dense.name} statistics" / "model.json")
    assert numbers == original.num_parameters() + sum(
        min(m.shape) * sum(m.shape) - m.shape[0] * m.shape[1] for m in facts.matrices
    )

    model.save_pretrained(tmp_path / "second")
    type(model).from_pretrained(tmp_path / "second").save_pretrained(tmp_path / "third")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "third" / name).read_bytes()
    assert set(stored(tmp_path / "second")) == set(tensors)
    for target, source in original.all_tied_weights_keys.items():
        assert model.get_parameter(target) is model.get_parameter(source)

    generated = "no"
    if is_causal(model.config):
        made = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        plain = original.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(made, plain)
        generated = "yes"
    row = {"class": type(model).__name__, "largest difference of an output": f"{difference:.1e}", "parameters": f"{numbers:,}"}
    row |= {"bytes": f"{manifest['model_stored_bytes']:,}", "save, load, save": "same bytes", "generates": generated}
    record_property("architecture", row)


@pytest.mark.parametrize("kind", ["basis_sharing", "coupled"])
def test_shared_factors_stay_stored_once(dense, tmp_path, kind):
    options = {"starts": 1, "sweeps": 2} if kind == "coupled" else {}
    mixture = any("experts" in name for name in describe(dense)["tensors"])
    targets = ["attention"] if mixture and kind == "coupled" else TARGETS  # experts of two layers do not correspond
    folder = build(dense, tmp_path / "work", targets, 0.6, kind, **options)
    model = load_model(folder, "float32", "cpu")
    layouts = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert any(layout.get("basis_of") or layout.get("shared") for layout in layouts.values())
    model.save_pretrained(tmp_path / "again")
    before, after = stored(folder), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert unique_bytes(type(model).from_pretrained(tmp_path / "again")) == sum(t.nbytes for t in before.values())


def test_experts_with_few_tokens_stay_dense_and_are_listed(tmp_path):
    """A mixture in the Gram metric: an expert is compressed where its own tokens span its inputs, and listed where not."""
    config = transformers.Qwen3MoeConfig(**{**TINY["qwen3_moe"][1], "num_experts": 16})
    torch.manual_seed(0)
    transformers.Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "dense")
    folder = build(tmp_path / "dense", tmp_path / "work", TARGETS, 0.6, "low_rank", metric="gram")
    moments, _ = statistics(tmp_path / "dense", tmp_path / "dense statistics")
    files = ModelFiles(tmp_path / "dense statistics" / "model.json")
    counts = {layer: moments.tensors(f"layer-{layer:03d}.safetensors") for layer in (0, 1)}
    experts = [m for m in files.matrices if m.expert is not None]
    assert len(experts) == 2 * 16 * 3
    assert sum(int(counts[0][f"expert{e:03d}.ffn_input.count"]) for e in range(16)) == 8 * 32 * 2, "two experts per token"
    seen = {m.name: int(counts[m.layer][f"{m.site}.count"]) for m in experts}
    few = {name: count for name, count in seen.items() if count < (16 if "down" in name else 32)}
    assert 0 < len(few) < len(experts)
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert recipe["left_dense"] == few
    layers = json.loads((folder / "config.json").read_text())["quantization_config"]["layers"]
    assert {m.name for m in files.matrices if m.module in layers} == {m.name for m in files.matrices} - set(few)
    card = (folder / "README.md").read_text()
    assert all(f"- `{name}`: {count:,} tokens" in card for name, count in few.items())
    model = load_model(folder, "float32", "cpu")
    for m in experts:
        if m.name in few:
            assert torch.equal(model.get_parameter(f"{m.module}.weight"), files.tensor(f"{m.module}.weight"))
    model.save_pretrained(tmp_path / "again")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(outputs(again), outputs(model))


def test_experts_apart_are_the_model_that_transformers_has(tmp_path):
    for name in ("qwen3_moe", "mixtral"):
        model = pico(name)
        model.save_pretrained(tmp_path / name)
        torch.testing.assert_close(outputs(load_model(tmp_path / name, "float32", "cpu")), outputs(model), atol=1e-6, rtol=1e-5)


def test_statistics_of_an_expert_are_those_of_its_tokens(tmp_path):
    """Against the same sums over what its router sends it, with and without the first token of every window."""
    pico("mixtral").save_pretrained(tmp_path / "dense")
    write_json(tmp_path / "model.json", describe(tmp_path / "dense"))
    files, model = ModelFiles(tmp_path / "model.json"), load_model(tmp_path / "dense", "float32", "cpu")
    windows = torch.randint(0, 1024, (3, 8), generator=torch.Generator().manual_seed(2))
    block, calls = model.get_submodule("model.layers.1.mlp"), []
    hook = block.experts.register_forward_pre_hook(lambda _m, args: calls.append([a.clone() for a in args]))
    for skipped in (0, 1):
        calls.clear()
        sites = dict(collect(model, files.matrices, windows, 3, torch.float64, first_token=not skipped))[1]
        (x, chosen, _), place = calls[0], torch.arange(3 * 8) % 8
        for expert in range(4):
            own = x[(chosen == expert).any(-1) & (place >= skipped)].double()
            found = sites[f"expert{expert:03d}.ffn_input"]
            assert int(found["count"]) == len(own) > 0
            torch.testing.assert_close(found["gram"], own.T @ own / len(own))
            with torch.no_grad():
                e = block.experts[expert]
                hidden = (e.act_fn(e.w1(own.float())) * e.w3(own.float())).double()
            torch.testing.assert_close(
                sites[f"expert{expert:03d}.ffn_hidden"]["cross"], hidden.T @ own / len(own), atol=1e-6, rtol=1e-4
            )
    hook.remove()


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FFN, "shared_basis", "cluster", "gauge_fixed", "tiers", "bypass"])
def test_experts_take_every_form_but_the_coupled_one(tmp_path, kind):
    pico("mixtral").save_pretrained(tmp_path / "dense")
    model = load_model(build(tmp_path / "dense", tmp_path / "work", targets_of(kind), 0.6, kind), "float32", "cpu")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(load_model(tmp_path / "again", "float32", "cpu")), outputs(model))


@pytest.fixture(scope="module")
def phi3(tmp_path_factory):
    folder = tmp_path_factory.mktemp("phi3") / "model"
    pico("phi3").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", [*FFN, "cluster", "shared_basis", "gauge_fixed"])
def test_fused_gate_and_up_take_every_form(phi3, tmp_path, kind):
    """As the same FFN with gate and up apart (Llama's) does: the same outputs from the same fit."""
    exact = kind != "affine_block"
    full = load_model(build(phi3, tmp_path / "full", targets_of(kind), None, kind), "float32", "cpu")
    if exact:
        torch.testing.assert_close(outputs(full), outputs(load_model(phi3, "float32", "cpu")), atol=2e-5, rtol=1e-4)
    model = load_model(build(phi3, tmp_path / "less", targets_of(kind), 0.6, kind), "float32", "cpu")
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path / "again")), outputs(model))


@pytest.mark.parametrize("kind", FFN)
def test_fused_gate_and_up_give_what_separate_ones_do(tmp_path, kind):
    """One FFN, written with gate and up in one matrix and in two: the fits give the same numbers."""
    phi = pico("phi3")
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY["phi3"][1], rms_norm_eps=phi.config.rms_norm_eps))
    state = {}
    for name, tensor in phi.state_dict().items():
        if name.endswith("gate_up_proj.weight"):
            halves = zip(("gate", "up"), tensor.chunk(2), strict=True)
            state |= {name.replace("gate_up", half): part for half, part in halves}
        elif name.endswith("qkv_proj.weight"):
            parts = zip("qkv", tensor.split([32, 16, 16]), strict=True)
            state |= {name.replace("qkv_proj", f"{part}_proj"): rows for part, rows in parts}
        else:
            state[name] = tensor
    plain.load_state_dict(state)
    found = []
    for name, model in (("fused", phi), ("apart", plain)):
        model.save_pretrained(tmp_path / name)
        found.append(load_model(build(tmp_path / name, tmp_path / f"{name} work", ["ffn"], 0.6, kind), "float32", "cpu"))
    torch.testing.assert_close(outputs(found[0]), outputs(found[1]), atol=1e-6, rtol=1e-5)
    assert abs(found[0].num_parameters() - found[1].num_parameters()) == 0


def test_without_a_head_or_with_another_head(tmp_path):
    """The encoder alone and a fresh head load from a masked language model's checkpoint, as from a dense one."""
    for name in ("bert_masked", "roberta_masked"):
        pico(name).save_pretrained(tmp_path / name)
        folder = build(tmp_path / name, tmp_path / f"{name} work", TARGETS, 0.6, "basis_sharing")
        whole = load_model(folder, "float32", "cpu")
        encoder = transformers.AutoModel.from_pretrained(folder).eval()
        with torch.no_grad():
            hidden = whole.base_model(input_ids=IDS).last_hidden_state
            assert torch.equal(encoder(input_ids=IDS).last_hidden_state, hidden)
        encoder.save_pretrained(tmp_path / f"{name} encoder")
        again = transformers.AutoModel.from_pretrained(tmp_path / f"{name} encoder").eval()
        with torch.no_grad():
            assert torch.equal(again(input_ids=IDS).last_hidden_state, hidden)
        for source in (folder, tmp_path / f"{name} encoder"):
            classifier = transformers.AutoModelForSequenceClassification.from_pretrained(source, num_labels=3).eval()
            with torch.no_grad():
                assert classifier(input_ids=IDS).logits.shape == (2, 3)
                assert torch.equal(classifier.base_model(input_ids=IDS).last_hidden_state, hidden)
        classifier.save_pretrained(tmp_path / f"{name} classifier")
        assert torch.equal(outputs(load_model(tmp_path / f"{name} classifier", "float32", "cpu")), outputs(classifier))


def test_encoders_have_no_perplexity(tmp_path):
    for name in ("bert_masked", "bert_classifier", "bert", "roberta"):
        pico(name).save_pretrained(tmp_path / name)
        facts = describe(tmp_path / name)
        if TINY[name][1].get("is_decoder"):
            check_causal(facts)
        else:
            with pytest.raises(InputError, match=f"next-token prediction, which {facts['class']} does not do"):
                check_causal(facts)
    assert facts["max_length"] == 62, "RoBERTa's position embeddings have two rows that no token uses"


@pytest.fixture(scope="module")
def compressed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compressed")
    pico("llama").save_pretrained(folder / "dense")
    return build(folder / "dense", folder / "work", TARGETS, 0.6)


@pytest.mark.parametrize("placement", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(compressed, placement):
    model = transformers.AutoModelForCausalLM.from_pretrained(compressed, device_map=placement).eval()
    assert torch.equal(outputs(model).cpu(), outputs(load_model(compressed, "float32", "cpu")))


def test_other_dtypes(compressed):
    model = load_model(compressed, "float32", "cpu")
    half = transformers.AutoModelForCausalLM.from_pretrained(compressed, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    expected = outputs(model)
    for other in (half, model.to(torch.bfloat16)):
        torch.testing.assert_close(outputs(other).float(), expected, atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_it_compiles(compressed):
    model = load_model(compressed, "float32", "cpu")
    expected = outputs(model)
    torch._dynamo.reset()
    torch.testing.assert_close(outputs(torch.compile(model, backend="eager")), expected, atol=1e-5, rtol=1e-4)


def test_lora_on_the_factors(compressed, tmp_path):
    """Adapters by peft on the two factors of a matrix: they start as nothing, learn, and are saved and loaded by themselves."""
    import peft

    model = load_model(compressed, "float32", "cpu")
    before = outputs(model)
    config = peft.LoraConfig(r=2, target_modules=r".*down_proj\.(left|right)", task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, config)
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 2
    assert all("down_proj" in name and "lora" in name for name in trained)
    assert torch.equal(outputs(adapted), before)
    optimiser = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=10.0)
    first = adapted(input_ids=IDS, labels=IDS).loss
    first.backward()
    optimiser.step()
    assert adapted(input_ids=IDS, labels=IDS).loss < first
    after = outputs(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(load_model(compressed, "float32", "cpu"), tmp_path / "adapter").eval()
    assert torch.equal(outputs(loaded), after)
    torch.testing.assert_close(outputs(loaded.merge_and_unload()), after, atol=1e-5, rtol=1e-4)
