"""Assignments of channels to clusters: bins, k-means on what it is told to look at, and the table of them."""

import pandas as pd
import pytest
import torch

from winnow.calibration.clusters import Clustering, assign, assign_all, cluster_rows
from winnow.errors import InputError
from winnow.factors.fit import labels_by_matrix
from winnow.io.artifacts import Bundle, write_json, write_manifest, write_tensors
from winnow.models.architectures import Matrix
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe

UP = Matrix(0, "up_proj", "layers.0.up_proj", "ffn_input", (6, 24), False, False)
DOWN = Matrix(0, "down_proj", "layers.0.down_proj", "ffn_hidden", (24, 6), False, False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_axes_are_columns_or_rows_by_what_they_are():
    sides = {axis: [Clustering(axis=axis).on_rows(m) for m in (UP, DOWN)] for axis in ("columns", "rows", "d_model", "neurons")}
    assert sides == {"columns": [False, False], "rows": [True, True], "d_model": [False, True], "neurons": [True, False]}


def test_bins_are_equal_and_in_order():
    weight = normal(6, 24) * torch.linspace(1, 9, 24, dtype=torch.float64)
    labels, distance = assign(weight, {}, Clustering(clusters=5, by="norm"), UP)
    assert sorted(labels.bincount().tolist()) == [4, 5, 5, 5, 5]
    norms = weight.norm(dim=0)
    for cluster in range(4):
        assert norms[labels == cluster].min() >= norms[labels == cluster + 1].max()
    assert (distance >= 0).all()
    again = [assign(weight, {}, Clustering(clusters=5, by="random", seed=seed), UP)[0] for seed in (1, 1, 2)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(again[0], again[2])


def test_cosine_finds_directions_whatever_their_length():
    centres, member = normal(3, 6, seed=1), torch.arange(24) % 3
    columns = centres[member] * torch.logspace(-2, 2, 24, dtype=torch.float64)[:, None] * (1 + 0.01 * normal(24, 6))
    labels, distance = assign(columns.T, {}, Clustering(clusters=3, by="cosine"), UP)
    assert all(len(set(labels[member == c].tolist())) == 1 for c in range(3))
    assert float(distance.max()) < 0.1


def test_co_activation_finds_units_that_fire_together():
    member = torch.arange(24) % 2
    hidden = normal(2, 500)[member] + 0.1 * normal(24, 500, seed=3)
    hidden[::3] *= -1  # the sign of a unit is a matter of its outgoing weights
    site = {"gram": hidden @ hidden.T / 500, "mean": hidden.mean(1)}
    labels, _ = assign(normal(6, 24), site, Clustering(clusters=2, by="co_activation"), UP)
    assert all(len(set(labels[member == c].tolist())) == 1 for c in range(2))


@pytest.mark.parametrize("by", ["norm", "cosine"])
def test_what_cannot_be_clustered_is_refused(by):
    with pytest.raises(ValueError, match="24 channels cannot form 30 clusters"):
        assign(normal(6, 24), {}, Clustering(clusters=30, by=by), UP)
    with pytest.raises(ValueError, match="not finite"):
        assign(normal(6, 24).fill_(float("nan")), {}, Clustering(by=by), UP)
    same = torch.ones(6, 24, dtype=torch.float64)
    with pytest.raises(ValueError, match="only 1 distinct clusters by cosine, 4 are requested"):
        assign(same, {}, Clustering(by="cosine"), UP)


def test_the_table_gives_back_the_labels(saved_llama, tmp_path):
    write_json(tmp_path / "model.json", describe(saved_llama))
    files = ModelFiles(tmp_path / "model.json")
    clustering = Clustering(axis="neurons", by="norm", clusters=3)
    table = pd.concat([pd.DataFrame(rows) for rows in assign_all(files, None, clustering)])
    assert list(table.columns) == ["layer", "role", "axis", "channel", "cluster", "distance"]
    labels = labels_by_matrix(table)
    assert set(labels) == {m.name for m in files.matrices}
    matrix = next(m for m in files.matrices if m.role == "up_proj")
    assert torch.equal(labels[matrix.name], assign(files.weight(matrix), {}, clustering, matrix)[0])
    assert cluster_rows(labels[matrix.name], torch.zeros(96), clustering, matrix)["axis"][0] == "rows"


def test_a_matrix_that_cannot_be_clustered_is_named(saved_llama, tmp_path):
    write_json(tmp_path / "model.json", describe(saved_llama))
    files = ModelFiles(tmp_path / "model.json")
    for layer in (0, 1):
        profile = {key: torch.ones(96) for key in ("rms", "mean_abs", "max_abs", "active", "mean")}
        sites = {
            site: {k: v[:n].clone() for k, v in profile.items()} for site, n in (("attention_input", 64), ("ffn_hidden", 96))
        }
        tensors = {f"{site}.{key}": value for site, values in sites.items() for key, value in values.items()}
        write_tensors(tmp_path / "moments" / f"layer-{layer:03d}.safetensors", tensors)
    write_manifest(tmp_path / "moments", {}, {})
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.q_proj: only 1 distinct clusters by activation"):
        list(assign_all(files, Bundle(tmp_path / "moments" / "manifest.json"), Clustering(by="activation")))
