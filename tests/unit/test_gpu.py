"""On a GPU everything is what it is on the CPU: statistics, gradients, fits, predictions, losses and recoveries."""

from dataclasses import replace

import pytest
import torch

from tests.conftest import VOCABULARY
from tests.unit.test_checkpoint import build
from tests.unit.test_recovery import KINDS, TRAINED, compressed, losses
from tests.unit.test_recovery import WINDOWS as TRAINING
from tests.unit.test_structures import PAIRS, named
from tests.unit.worlds import World
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect, collect_by_block
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import NAMES, Streamed
from winnow.evaluation.perplexity import evaluate, evaluate_by_block
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.recovery.base import recovery_of
from winnow.recovery.recover import given_of
from winnow.structures.base import STRUCTURES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
DEVICES = ("cpu", "cuda")
WINDOWS = torch.randint(0, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(0))
FIRST = torch.ones(5, dtype=torch.int32)
SINGLE = 1e-5  # largest difference of numbers made in float32, relative to the largest of a tensor


def assert_near(found: torch.Tensor, expected: torch.Tensor, share: float, what: object) -> None:
    scale = float(expected.abs().max())
    assert float((found.cpu() - expected.cpu()).abs().max()) <= share * scale, what


def by_layer(found) -> dict[tuple, torch.Tensor]:
    return {(layer, site, key): t for layer, sites in found for site, values in sites.items() for key, t in values.items()}


@pytest.fixture
def files(saved_model, tmp_path) -> ModelFiles:
    write_json(tmp_path / "model.json", describe(saved_model))
    return ModelFiles(tmp_path / "model.json")


def assert_same(cpu: dict[tuple, torch.Tensor], gpu: dict[tuple, torch.Tensor]) -> None:
    assert cpu.keys() == gpu.keys()
    for key, value in cpu.items():
        if key[-1] == "count":
            assert torch.equal(gpu[key], value), key
        elif key[-1] != "active":  # a number near 0 may have either sign
            assert_near(gpu[key], value, SINGLE, key)


def test_statistics_and_gradients(files):
    found, gradients = [], []
    for device in DEVICES:
        model = load_model(files.directory, "float32", device)
        found.append(by_layer(collect(model, files.matrices, WINDOWS, 2, torch.float32)))
        gradients.append(by_layer(collect_gradients(model, files.matrices, WINDOWS, 2, torch.float32, "text", 0)))
    assert_same(*found)
    assert_same(*gradients)


def test_statistics_of_16_bits_are_summed_in_32(files):
    """The products of a GPU's own 16 bit units against float64 products of the same inputs."""
    model, found = load_model(files.directory, "bfloat16", "cuda"), []
    for precision in (torch.float64, torch.float32):
        found.append(by_layer(collect(model, files.matrices, WINDOWS, 5, precision)))
    assert_same(*found)


def test_streamed_on_the_gpu_is_in_memory_on_the_cpu(files, tmp_path):
    streamed = Streamed(files.directory, "float32", "cuda", tmp_path / "moments", WINDOWS.shape[1])
    by_block = by_layer(collect_by_block(streamed, files.matrices, WINDOWS, 2, torch.float32))
    model = load_model(files.directory, "float32", "cpu")
    assert_same(by_layer(collect(model, files.matrices, WINDOWS, 2, torch.float32)), by_block)


@pytest.mark.parametrize(("spec", "metric_kind"), PAIRS, ids=named)
def test_fits_and_predictions(spec, metric_kind):
    """Errors at every size; factors may differ where directions are as good as each other."""
    structure, world = STRUCTURES.build(spec), World(metric_kind, 8, 12, 3)
    for group in structure.groups(world.matrices):
        problem = world.problem(structure, group)
        moved = {name: on_the_gpu(getattr(problem, name)) for name in ("weights", "biases", "sites", "outputs")}
        size = structure.limit(group)
        cpu, gpu = structure.fit(problem, size), structure.fit(replace(problem, **moved), size)
        assert_near(gpu.error, cpu.error, 1e-9, "error")
        for name, tensor in gpu.tensors.items():
            assert tensor.shape == cpu.tensors[name].shape
        if structure.predicts and "gradient_gram" in world.problem(structure, group).outputs[group[0].name]:
            given = replace(problem, metric=None, sites=full_sites(world, group))
            moved = {name: on_the_gpu(getattr(given, name)) for name in ("weights", "biases", "sites", "outputs")}
            losses = structure.predicted(given, cpu.tensors)
            assert_near(structure.predicted(replace(given, **moved), on_the_gpu(cpu.tensors)), losses, 1e-9, "predicted")


def on_the_gpu(value):
    return {key: on_the_gpu(of) for key, of in value.items()} if isinstance(value, dict) else value.cuda()


def full_sites(world, group):
    return {m.name: world.moments(m.layer, m.site) for m in group}


def test_losses(files, tmp_path):
    checkpoint = build(files.directory, tmp_path / "work", ["ffn", "attention"], 0.5)
    paths, rows = (checkpoint, files.directory), []
    for device in DEVICES:
        rows.append(evaluate(*(load_model(path, "float32", device) for path in paths), WINDOWS, FIRST, 2))
    place = (tmp_path / "perplexity.json", WINDOWS.shape[1], None)
    streamed = [Streamed(path, "float32", "cuda", *place, name) for path, name in zip(paths, NAMES, strict=True)]
    rows.append(evaluate_by_block(*streamed, WINDOWS, FIRST, 2))
    for other in rows[1:]:
        assert other["nll"] == pytest.approx(rows[0]["nll"], rel=1e-5)
        assert other["kl"] == pytest.approx(rows[0]["kl"], rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_recoveries(kind):
    """Trained on either device, it starts from the same loss and lowers it."""
    files, checkpoint = compressed("llama")
    reports = []
    for device in DEVICES:
        given = given_of(files, checkpoint, TRAINING, recovery_of(KINDS[kind]).options, True, device)
        reports.append(losses(recovery_of(KINDS[kind]).recover(given)))
    for (start, _), (own, best) in zip(*reports, strict=True):
        assert best < own
        if kind in TRAINED:
            assert own == pytest.approx(start, rel=1e-3)
