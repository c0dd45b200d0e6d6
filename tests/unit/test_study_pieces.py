"""Studies in bounded time: a measurement that was killed goes on with the same bytes; sizes are options; forecasts follow."""

import json
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT, VOCABULARY, pico
from tests.unit.test_checkpoint import statistics
from winnow.errors import InputError
from winnow.io.artifacts import write_json
from winnow.io.resume import Pieces
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.models.shape import shape_of
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan
from winnow.studies.base import Asked, Given, fewer, spread, study_of
from winnow.studies.bypass import study as bypass
from winnow.studies.ffsplit import study as ffsplit

KEY = {"rule": "some", "params": {"spec": {"a": 1}}, "inputs": {"b": "c"}, "wildcards": {}}
IDS = torch.randint(0, VOCABULARY, (10, 24), generator=torch.Generator().manual_seed(3))
FIRST = torch.ones(10, dtype=torch.int64)
SIZES = {
    "linearity": {"steps": 2, "windows": 4},
    "bypass": {},
    "coupling": {"steps": 5},
    "clusters": {"columns": 4},
    "ffsplit": {"windows": 2},
}


class Killed(Exception):
    pass


class Fragile(Pieces):
    """Dies after some pieces, and counts those that it makes."""

    made, last = 0, 10**6

    def once(self, name, make):
        if name not in self.found:
            if self.made == self.last:
                raise Killed
            self.made += 1
        return super().once(name, make)


def rounded(content):
    """The content with numbers of 9 decimals."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items()}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 9) if isinstance(content, float) else content


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("studied")
    pico("llama").save_pretrained(folder / "model")
    moments, _ = statistics(folder / "model", folder)
    write_json(folder / "model.json", describe(folder / "model"))
    return Given(ModelFiles(folder / "model.json"), "float32", "cpu", moments, IDS, (IDS[:6], FIRST[:6]))


@pytest.mark.parametrize("name", SIZES)
def test_a_killed_measurement_goes_on_with_the_same_bytes(given, tmp_path, name, monkeypatch):
    from winnow.studies.linearity import measurement

    for steps in ("TRAINED", "EVERY"):  # of a baseline, which is long
        monkeypatch.setattr(measurement, steps, 2)
    monkeypatch.setattr(measurement, "PROBES", {"rank": 2, "steps": 2})
    brief = {"batches": [1], "prompts": [8], "decode": 2, "repeats": 3, "warm_up": 1}
    for of in (bypass, ffsplit):
        monkeypatch.setattr(of, "TIMED", brief)
    study = study_of(name, SIZES[name])

    def measured(pieces):
        found = dict(study.measure(Given(**{**vars(given), "pieces": pieces})))
        assert found.pop("latency", [{}])  # seconds, which are never the same
        # Singular vectors of small matrices can differ in the last bit with the place in memory, on the same machine.
        return json.dumps(found) if name != "coupling" else json.dumps(rounded(found))

    whole = Fragile(tmp_path / "a.json", KEY)
    expected, total = measured(whole), whole.made
    assert total >= 4
    cut = Fragile(tmp_path / "b.json", KEY)
    cut.last = total // 2
    with pytest.raises(Killed):
        measured(cut)
    again = Fragile(tmp_path / "b.json", KEY)
    assert measured(again) == expected == measured(Pieces())
    assert again.made == total - total // 2
    again.clear()
    assert not list(tmp_path.glob(".b.json*"))


def test_pieces_of_another_job_and_damaged_ones_are_not_used(tmp_path):
    artefact = tmp_path / "a.json"
    Pieces(artefact, KEY).once("one", lambda: [0.1, (1, 2)])
    assert Pieces(artefact, {**KEY, "inputs": {}}).found == {}
    Pieces(artefact, KEY).once("one", lambda: 1)
    Pieces(artefact, KEY).once("two", lambda: 2)
    state: Path = tmp_path / ".a.json.state"
    text = state.read_text()
    state.write_text(text[:-3])  # killed while it wrote
    assert Pieces(artefact, KEY).found == {"one": 1}
    state.write_text(text.replace('"one", 1', '"one", 3'))
    assert Pieces(artefact, KEY).found == {}


def test_windows_are_cut_and_those_without_a_scored_token_left_out(given):
    first = torch.tensor([1, 1, 9, 1, 7, 8])
    cut = Given(**{**vars(given), "evaluation": (IDS[:6], first)}).cut(8)
    assert cut.windows.shape == (10, 8)
    assert cut.evaluation[0].tolist() == IDS[[0, 1, 3, 4], :8].tolist()
    assert cut.evaluation[1].tolist() == [1, 1, 1, 7]
    same = given.cut(256)
    assert torch.equal(same.windows, IDS)
    assert (fewer(200, 1e6), fewer(200, 80e6), fewer(200, 1e12)) == (200, 100, 20)
    assert spread(list(range(30)), 8) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert spread(list(range(6)), 8) == list(range(6))


def test_sizes_are_options_of_the_configuration_and_defaults_leave_no_trace():
    config = default()
    plan = Plan(load(config), ROOT)
    label, calibration = plan.labels["models"]["demo"], plan.labels["calibrations"]["demo"]
    wildcards = {"model": label, "calibration": calibration, "study": "linearity"}
    assert plan.spec("measure_study", wildcards) == {"study": "linearity", "dtype": "float32"}
    config["studies"] = {"linearity": {"layers": 4}}
    other = Plan(load(config), ROOT)
    assert other.spec("measure_study", wildcards)["options"] == {"layers": 4}
    assert other.labels == plan.labels
    shape = {"demo": shape_of(ROOT / "resources" / "models" / "demo")}
    rows, fewer = ({w.target: w for w in forecast(p, shape) if w.target} for p in (plan, other))
    assert set(rows) == {f"study_{name}" for name in ("bypass", "clusters", "coupling", "ffsplit", "linearity")}
    assert fewer["study_linearity"].operations < rows["study_linearity"].operations
    assert fewer["study_coupling"] == rows["study_coupling"]
    config["studies"] = {"linearity": {"layer": 4}}
    with pytest.raises(InputError, match=r"studies.linearity.layer: unknown key; did you mean"):
        load(config)


def test_the_work_of_a_model_of_135_million_numbers_is_bounded():
    """Windows of any number and length cost the same, from the defaults on."""
    shape = shape_of(ROOT / "resources" / "models" / "demo")
    for name in ("linearity", "ffsplit", "clusters"):
        study = study_of(name)
        one, other = (study.work(Asked(shape, 4, (128, n), (128, n), 30)) for n in (256, 2048))
        assert one == other
