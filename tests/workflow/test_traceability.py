"""Three numbers of every study, traced back to what they rest on and computed again by other means.

By default of a tiny model; with the environment variable WINNOW_RESULTS of the runs in that folder, which is only read.
"""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from tests.workflow.traces import Trace, bypass, clusters, coupling, ffsplit, linearity
from winnow.studies import base as studies

pytestmark = [pytest.mark.workflow, pytest.mark.slow]
NUMBERS = {"bypass": bypass, "clusters": clusters, "coupling": coupling, "ffsplit": ffsplit, "linearity": linearity}
ROWS = [(study, claim, recount) for study, module in NUMBERS.items() for claim, recount in module.ROWS.items()]
EXACT = 1e-8  # relative
ROUNDED = {
    "coupling_against_svd": 1e-2,  # two descents, from starts of their own
    "linearity_highest": 1e-5,  # activations in float32, in batches of other sizes
    "linearity_definition": 1e-4,  # a difference of two of them
    "linearity_trained": 1e-2,  # 3,000 steps in float32, and a difference of near equals
}


@pytest.fixture(scope="module")
def folder(request) -> Path:
    """A folder in which all studies have run."""
    if given := os.environ.get("WINNOW_RESULTS"):
        return Path(given).resolve()
    place = request.getfixturevalue("studied")
    for name in list(studies.STUDIES):  # one by one: a run of all would be too long for the limit on its time
        done = place.run(f"study_{name}")
        assert done.returncode == 0, done.stdout + done.stderr
    return place.folder


@pytest.fixture(scope="module")
def trace_of(folder) -> Callable[[str], Trace]:
    """The trace of a study, by its name; each is made once."""
    return cache(lambda study: Trace(folder, study))


@pytest.mark.parametrize("study", list(studies.STUDIES))
def test_the_trace_reaches_the_model_and_the_text_through_unharmed_files(trace_of, study):
    trace = trace_of(study)
    above = list(trace.above(trace.top))
    assert not trace.damaged
    assert {"measure_study", "evaluate_dense", "retrieve_model", "tokenize"} <= {trace.rules.get(path) for path in above}
    assert all((trace.folder / path).exists() for path in above)


def test_every_study_has_three_numbers_here():
    assert {study: len(module.ROWS) for study, module in NUMBERS.items()} == dict.fromkeys(list(studies.STUDIES), 3)


@pytest.mark.parametrize(("study", "claim", "recount"), ROWS, ids=[row[1] for row in ROWS])
def test_a_number_follows_from_what_it_is_traced_to(trace_of, study, claim, recount, record_property):
    trace = trace_of(study)
    claims = pd.read_csv(trace.folder / "results" / "studies" / study / "claims.csv")
    (row,) = claims[(claims["id"] == claim) & (claims["value"].notna())].to_dict("records")
    value, error = recount(trace)
    record_property("traced", {"claim": claim, "claimed": row["number"], "reported": row["value"], "recomputed": value})
    print(
        f"{claim}: claimed {row['number']}, reported {row['value']:.12g} ± {row['error']:.6g}, again {value:.12g} ± {error:.6g}"
    )
    near = {"rel": ROUNDED.get(claim, EXACT), "abs": 1e-12}
    assert value == pytest.approx(row["value"], **near)
    assert error == pytest.approx(row["error"], **near)
