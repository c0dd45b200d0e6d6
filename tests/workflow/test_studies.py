"""Studies through the workflow on a tiny model: every claim with a verdict, and nothing to do afterwards."""

import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.workflow.test_end_to_end import Workspace
from winnow import studies
from winnow.claims import read_claims

pytestmark = [pytest.mark.workflow, pytest.mark.slow]


def test_studies_judge_every_claim_of_theirs(tmp_path):
    place = Workspace(tmp_path)
    targets = [f"study_{name}" for name in studies.names()]
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
    assert not place.planned(*targets)
