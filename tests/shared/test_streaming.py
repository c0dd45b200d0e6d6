"""Gradients of trained models, block by block, are those of the models in memory."""

import pytest
import torch

from tests.conftest import SHARED
from tests.shared.test_references import P1
from tests.unit.test_streaming import LAST
from winnow.calibration.gradients import collect_gradients
from winnow.calibration.gradients_by_block import collect_gradients_by_block
from winnow.checkpoint.loading import load_model
from winnow.checkpoint.streaming import Streamed
from winnow.data.texts import read_rows
from winnow.data.tokens import encode, load_tokenizer
from winnow.io.artifacts import write_json
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.planning.config import Text

pytestmark = [
    pytest.mark.shared,
    pytest.mark.skipif(not (SHARED / "models").is_dir(), reason="no shared models beside the checkout"),
]


@pytest.mark.parametrize("name", ["wt2-llama", "wt2-gpt2", "wt2-opt"])
def test_gradients_of_trained_models(name, tmp_path):
    source, preset = SHARED / "models" / name, Text(**P1)
    text = preset.join.join(read_rows(preset.model_dump())[:400])
    ids = torch.from_numpy(encode(load_tokenizer(source), text, special_tokens=False))
    windows = ids[: 6 * 128].reshape(6, 128)
    write_json(tmp_path / "model.json", describe(source))
    options = (ModelFiles(tmp_path / "model.json").matrices, windows, 4, torch.float64, "model", 0)
    expected = dict(collect_gradients(load_model(source, "float64", "cpu"), *options))
    found = dict(collect_gradients_by_block(Streamed(source, "float64", "cpu", tmp_path / "artefact", 128), *options))
    assert found.keys() == expected.keys()
    for layer, roles in expected.items():
        for role, values in roles.items():
            for key, value in values.items():
                difference = float((found[layer][role][key] - value).abs().max())
                assert difference <= LAST * float(value.abs().max()), (layer, role, key)
