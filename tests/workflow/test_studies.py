"""Studies through the workflow on a tiny model: every claim with a verdict, and nothing to do afterwards."""

import pandas as pd
import pytest
import transformers

from tests.conftest import ROOT, TINY
from tests.workflow.test_end_to_end import Workspace
from winnow import studies
from winnow.claims import read_claims

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workspace:
    """With as many layers as it takes to meet a budget in bytes by whole ranks of clusters."""
    place = Workspace(tmp_path_factory.mktemp("studies"))
    class_name, options = TINY["llama"]
    cls = getattr(transformers, class_name)
    cls(cls.config_class(**{**options, "num_hidden_layers": 8})).save_pretrained(place.folder / "model")
    return place


@pytest.mark.parametrize("name", studies.names())
def test_studies_judge_every_claim_of_theirs(place, name):
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
