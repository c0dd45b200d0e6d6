"""Studies through the workflow on tiny models: every claim with a verdict, one page of all, and nothing to do afterwards."""

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.workflow.test_classification import Reviews
from tests.workflow.test_end_to_end import Workspace
from winnow import studies
from winnow.claims import read_claims

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_studies_judge_every_claim_of_theirs(tmp_path):
    place = Workspace(tmp_path)
    targets = [*(f"study_{name}" for name in studies.names()), "studies"]
    done = place.run(*targets)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in studies.names():
        folder, study = tmp_path / "results" / "studies" / name, studies.study_of(name)
        claims = pd.read_csv(folder / "claims.csv")
        assert set(claims["id"]) == {c.id for c in read_claims(ROOT / "resources" / "claims.yaml") if c.study == name}
        assert claims["verdict"].notna().all()
        assert all((folder / f"{table}.csv").stat().st_size > 20 for table in study.tables)
        assert all((folder / f"{figure}.{kind}").stat().st_size > 1000 for figure in study.figures for kind in ("svg", "png"))
        assert (pd.read_csv(folder / "identities.csv")["residual"] < 1e-8).all()
        assert "<svg" in (folder / "index.html").read_text()
    joined = (tmp_path / "results" / "studies" / "index.html").read_text()
    assert all(f'<section id="{name}">' in joined for name in studies.names())
    assert not place.planned(*targets)


def test_the_study_of_ffsplit_scores_the_classification_tasks_that_are_configured(tmp_path):
    place = Reviews(tmp_path)
    done = place.run("study_ffsplit")
    assert done.returncode == 0, done.stdout + done.stderr
    claims = pd.read_csv(tmp_path / "results" / "studies" / "ffsplit" / "claims.csv").set_index("id")
    glue = claims.loc["ffsplit_glue"]
    assert glue["model"] == "tiny, reviews"
    scores = pd.read_csv(tmp_path / "results" / "studies" / "ffsplit" / "scores.csv")
    accuracy = scores[scores["measure"] == "accuracy"].set_index(["method", "recovery"])
    assert glue["value"] == pytest.approx(100 * accuracy.loc[("split", "again"), "delta_control"])
    control = accuracy.loc[("split", "again"), "value"] - accuracy.loc[("dense", "again"), "value"]
    assert glue["value"] == pytest.approx(100 * control)
    assert claims.loc["ffsplit_speed", "verdict"] == "cannot be tested here"
