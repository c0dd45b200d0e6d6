"""Studies through the workflow on a tiny model: every claim with a verdict, and nothing to do afterwards."""

import pandas as pd
import pytest
import torch
import transformers

from tests.conftest import LLAMA, ROOT
from tests.workflow.test_end_to_end import Workspace
from winnow import studies
from winnow.claims import read_claims

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workspace:
    return deeper(Workspace(tmp_path_factory.mktemp("studies")))


def deeper(place: Workspace) -> Workspace:
    """With six layers: profiles over layers have a middle, and coarse forms meet their bytes."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**LLAMA, "num_hidden_layers": 6, "tie_word_embeddings": True})
    transformers.LlamaForCausalLM(config).save_pretrained(place.folder / "model")
    return place


@pytest.mark.parametrize("name", studies.names())
def test_a_study_judges_every_claim_of_its_own(place, name):
    done = place.run(f"study_{name}")
    assert done.returncode == 0, done.stdout + done.stderr
    folder, study = place.folder / "results" / "studies" / name, studies.study_of(name)
    claims = pd.read_csv(folder / "claims.csv")
    assert set(claims["id"]) == {c.id for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == name}
    assert claims["verdict"].notna().all()
    assert all((folder / f"{table}.csv").stat().st_size > 20 for table in study.tables)
    assert all((folder / f"{figure}.{kind}").stat().st_size > 1000 for figure in study.figures for kind in ("svg", "png"))
    assert (pd.read_csv(folder / "identities.csv")["residual"] < 1e-8).all()
    assert "<svg" in (folder / "index.html").read_text()
    assert not place.planned(f"study_{name}")
