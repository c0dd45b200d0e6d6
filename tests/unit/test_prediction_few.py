"""Predicted losses of fits to few calibration tokens: those on other text, not those on these tokens."""

import json

import pytest
import torch

from tests.conftest import ROOT
from winnow.allocation.rounds import Held
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.statistics import collect
from winnow.checkpoint.loading import load_model
from winnow.data.tokens import encode, load_tokenizer
from winnow.factors.fit import storable
from winnow.factors.predict import predict
from winnow.io.artifacts import write_json
from winnow.metrics.base import METRICS
from winnow.models.architectures import group_name, moments_file
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.structures.base import STRUCTURES, Problem

DEMO = ROOT / "resources" / "models" / "demo"


class Fits:
    """Factors in memory, read like a bundle of files."""

    def __init__(self):
        self.files = {}

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return self.files[name]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """(files, statistics of a token per hidden unit, those of 16 times as many others) of the demo model, of three layers."""
    folder = tmp_path_factory.mktemp("few")
    write_json(folder / "model.json", describe(DEMO))
    files, model = ModelFiles(folder / "model.json"), load_model(DEMO, "float32", "cpu")
    rows = (ROOT / "resources" / "texts" / "demo" / "calibration.jsonl").read_text().splitlines()
    ids = encode(load_tokenizer(DEMO), "\n\n".join(json.loads(row)["text"] for row in rows), True)
    windows = torch.as_tensor(ids[: 440 * 88]).reshape(440, 88)
    chosen = torch.randperm(440, generator=torch.Generator().manual_seed(0))
    found = []
    files.matrices = [m for m in files.matrices if m.layer % 2]
    for part in (chosen[:4], chosen[4:68]):
        moments = Held(collect(model, files.matrices, windows[part], 8, torch.float64))
        found.append((moments, Held(collect_gradients(model, files.matrices, windows[part], 8, torch.float64, "model", 0))))
    return files, *found


KINDS = [
    ({"kind": "low_rank"}, {"kind": "gram"}),
    ({"kind": "low_rank"}, {"kind": "two_sided"}),
    ({"kind": "neuron_slice", "criterion": "loss"}, None),
    ({"kind": "affine_block"}, None),
]


@pytest.mark.parametrize(("structure", "metric"), KINDS, ids=lambda spec: spec["kind"] if spec else "none")
def test_a_predicted_loss_is_that_on_other_text(few, structure, metric):
    """Fitted to 352 tokens, a token per hidden unit, at half of the sizes: all FFNs, or all down matrices."""
    files, (moments, gradients), (other_moments, other_gradients) = few
    own, fits = STRUCTURES.build(structure), Fits()
    groups = [g for g in own.groups(files.matrices) if g[-1].role == "down_proj"]
    for group in groups:
        sites = {m.name: statistics_of(moments, m.layer, m.site) for m in group}
        outputs = {m.name: statistics_of(gradients, m.layer, m.role) for m in group}
        weights = {m.name: files.weight(m) for m in group}
        problem = Problem(group, weights, sites, METRICS.build(metric) if metric else None, outputs=outputs)
        fit = own.fit(problem, own.largest(group))
        fits.files[f"{group_name(group)}.safetensors"] = storable(own, fit) | {"numbers": torch.arange(len(fit.error))}
    names = {name.removesuffix(".safetensors"): fits for name in fits.files}
    found = {name: losses[len(losses) // 2] for name, losses in predict(files, moments, gradients, names, own, "cpu")}
    true = {name: loss[len(loss) // 2] for name, loss in predict(files, other_moments, other_gradients, names, own, "cpu")}
    assert found.keys() == true.keys() == names.keys()
    ratio = float(sum(found.values()) / sum(true.values()))
    assert 0.5 < ratio < 2, ratio


def statistics_of(held: Held, layer: int, place: str) -> dict[str, torch.Tensor]:
    files = held.tensors(moments_file(layer))
    return {key.rpartition(".")[2]: t for key, t in files.items() if key.rpartition(".")[0] == place}
