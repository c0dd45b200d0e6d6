"""Studies through the workflow on a tiny model: every claim with a verdict, and nothing to do afterwards."""

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.workflow.test_classification import Reviews
from tests.workflow.test_end_to_end import Workspace
from winnow.studies import base as studies
from winnow.studies.claims import read_claims

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


@pytest.fixture
def place(studied) -> Workspace:
    return studied


@pytest.mark.parametrize("name", list(studies.STUDIES))
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


def test_all_studies_on_one_page(place):
    done = place.run("studies")
    assert done.returncode == 0, done.stdout + done.stderr
    page = (place.folder / "results" / "studies" / "index.html").read_text()
    assert all(f'<section id="{name}">' in page for name in list(studies.STUDIES))
    assert not place.planned("studies")


def test_the_study_of_ffsplit_scores_the_classification_tasks_that_are_configured(tmp_path):
    place = Reviews(tmp_path)
    done = place.run("study_ffsplit")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "results" / "studies" / "ffsplit"
    claims = pd.read_csv(folder / "claims.csv").set_index("id")
    scores = pd.read_csv(folder / "scores.csv")
    accuracy = scores[scores["measure"] == "accuracy"].set_index(["method", "recovery"])["value"]
    assert claims.loc["ffsplit_glue", "model"] == "tiny, reviews"
    assert claims.loc["ffsplit_glue", "value"] == pytest.approx(100 * (accuracy["split", "again"] - accuracy["dense", "again"]))
    assert claims.loc["ffsplit_speed", "verdict"] == "cannot be tested here"
