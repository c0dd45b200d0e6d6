"""Gradients of windows in portions are those of one portion, whenever the job is killed, within the disk that it may take."""

import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from tests.conftest import ROOT, TINY, VOCABULARY
from tests.unit.test_streaming import assert_same
from winnow.calibration import gradients_by_block, parts
from winnow.calibration.gradients import OutputMoments
from winnow.calibration.gradients_by_block import collect_gradients_by_block
from winnow.calibration.parts import LEAST, hidden_bound, portions_of, states_at_once
from winnow.calibration.stored import stored
from winnow.checkpoint.streaming import Streamed, clear_left
from winnow.io.artifacts import read_json, write_json, write_tensors
from winnow.io.hidden_states import HiddenStates
from winnow.io.resume import own_files
from winnow.models.architectures import moments_file
from winnow.models.files import ModelFiles
from winnow.models.retrieve import describe
from winnow.models.shape import shape_of
from winnow.planning.config import load
from winnow.planning.config_files import default
from winnow.planning.forecast import forecast
from winnow.planning.plan import Plan

LENGTH, BATCH, COUNT, BLOCKS = 12, 2, 5, 3
FEW = ("q_proj", "gate_proj", "down_proj")  # roles, where many jobs run
WINDOWS = torch.randint(0, VOCABULARY, (COUNT, LENGTH), generator=torch.Generator().manual_seed(0))
PROVENANCE = {"rule": "some", "params": {"spec": {"a": 1}}}
ONE = math.inf  # a bound that one portion fits into


class Model:
    """A tiny model of three blocks, with the bytes of a window's hidden states at all places where they are at once."""

    def __init__(self, folder: Path, name: str):
        self.folder, (cls, options) = folder, TINY[name]
        config = getattr(transformers, cls).config_class(**options)
        config.num_hidden_layers = BLOCKS
        torch.manual_seed(0)
        getattr(transformers, cls)(config).save_pretrained(folder / "model")
        write_json(folder / "model.json", describe(folder / "model"))
        self.matrices = ModelFiles(folder / "model.json").matrices
        self.window = states_at_once(BLOCKS) * LENGTH * config.hidden_size * 4

    def collect(
        self, artefact: Path, bound: float, precision=torch.float64, labels="model", provenance=None, few=False, **options
    ):
        matrices = [m for m in self.matrices if not few or m.role in FEW]
        streamed = Streamed(self.folder / "model", "float32", "cpu", artefact, LENGTH)
        given = (streamed, matrices, WINDOWS, BATCH, precision, labels, 3, False, provenance)
        return collect_gradients_by_block(*given, bound=bound, **options)

    def job(self, place: Path, bound: float) -> dict[str, bytes]:
        """What scripts/collect_gradients.py does, from the files that are there; returns those at its end."""
        kept = own_files(place, PROVENANCE)
        finished = [layer for layer in range(BLOCKS) if moments_file(layer) in kept]
        found = self.collect(place / "manifest.json", bound, torch.float32, provenance=PROVENANCE, few=True, finished=finished)
        for layer, roles in found:
            write_tensors(place / moments_file(layer), stored(roles), PROVENANCE)
        clear_left(place / "manifest.json")
        return {path.name: path.read_bytes() for path in place.iterdir()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A function from the name of a family to its model."""
    made: dict[str, Model] = {}

    def of(name: str = "llama") -> Model:
        if name not in made:
            made[name] = Model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return of


@pytest.mark.parametrize("labels", ["model", "text"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_portions_give_what_one_gives(model, name, labels, tmp_path, monkeypatch):
    drawn: list[torch.Tensor] = []
    sampled = gradients_by_block.sampled
    monkeypatch.setattr(gradients_by_block, "sampled", lambda *given: drawn.append(sampled(*given)) or drawn[-1])

    def collected(bound: float, **options):
        drawn.clear()
        found = dict(model(name).collect(tmp_path / "artefact", bound, labels=labels, **options))
        assert not list(tmp_path.iterdir()), "all that was between is removed"
        return found, torch.cat(drawn) if drawn else None

    whole, of_whole = collected(ONE)
    for windows in (4, 2, 1):  # one: less than a batch
        found, of_found = collected(windows * model(name).window)
        assert list(found) == list(whole) == [2, 1, 0]
        assert_same(found, whole)
        assert (of_whole is None) == (labels == "text")
        assert of_whole is None or torch.equal(of_found, of_whole), "the same labels"
        if windows > 1:  # the same batches are added in the same order
            assert all(torch.equal(found[n][role][k], v) for n, s in whole.items() for role, t in s.items() for k, v in t.items())
    assert_same(collected(2 * model(name).window, precision=torch.float32)[0], collected(ONE, precision=torch.float32)[0])


def test_sums_of_a_part_of_the_windows_run_in_portions_too(model, tmp_path):
    """`window_shards`: labels are those of the windows' numbers in the calibration."""
    options = {"first": 5, "sums": True}
    whole = dict(model().collect(tmp_path / "artefact", ONE, **options))
    found = dict(model().collect(tmp_path / "artefact", 2 * model().window, **options))
    assert set(found[0]["q_proj"]) == {"count", "gram", "fisher"}
    assert int(found[0]["q_proj"]["count"]) == COUNT * (LENGTH - 1)
    assert_same(found, whole)
    others = dict(model().collect(tmp_path / "artefact", 2 * model().window, first=6, sums=True))
    assert not torch.allclose(others[0]["q_proj"]["fisher"], whole[0]["q_proj"]["fisher"])


class Disk:
    """Sees every change of the files in a folder, with `before` called ahead of it, and the largest total sizes. Nothing is
    forced to the disk, which takes long."""

    def __init__(self, place: Path, monkeypatch, before=lambda: None):
        self.place, self.before = place, before
        self.states = self.all = 0  # bytes
        monkeypatch.setattr("os.fsync", lambda _file: None)
        for cls, name in ((HiddenStates, "write"), (Path, "unlink"), (Path, "replace")):
            monkeypatch.setattr(cls, name, self._seen(getattr(cls, name)))

    def _seen(self, change):
        def changed(own, *args, **kwargs):
            if self.place in getattr(own, "path", own).parents:
                self.before()
            made = change(own, *args, **kwargs)
            sizes = {path.name: path.stat().st_size for path in self.place.iterdir()}
            self.states = max(self.states, sum(size for name, size in sizes.items() if "-input-" in name or "-gradient-" in name))
            self.all = max(self.all, sum(size for name, size in sizes.items() if not name.endswith(".json")))
            return made

        return changed


@pytest.mark.parametrize("windows", [1, 2, 3, 4, COUNT])
def test_the_disk_that_is_taken_is_the_bound_and_what_is_forecast(model, windows, tmp_path, monkeypatch):
    """And of sums there is one layer more than in the result."""
    disk = Disk(tmp_path, monkeypatch)
    bound = windows * model().window
    files = model().job(tmp_path, bound)
    portions = portions_of(COUNT, BATCH, model().window, bound)
    assert disk.states == portions[0].stop * model().window <= bound
    sizes = [len(content) for content in files.values()]
    assert len(sizes) == BLOCKS
    twice = len(portions) > 1
    assert disk.all <= disk.states + 1.05 * (sum(sizes) + twice * max(sizes)), "means are in float32, some of the sums in float64"

    monkeypatch.setattr(parts, "MB", model().window)  # so that `hidden_mb` is a number of windows

    shape = shape_of(model().folder / "model")

    def forecast_disk(how: str) -> tuple[float, float]:
        """(bytes that stay, bytes of temporary files)"""
        config = default()
        config["models"]["demo"] |= {"source": str(model().folder / "model"), "load": how}
        config["calibrations"]["demo"] |= {"windows": COUNT, "length": LENGTH, "precision": "float32"}
        resources = {"collect_gradients": {"hidden_mb": windows, "batch_tokens": BATCH * LENGTH}}
        works = forecast(Plan(load(config), ROOT, resources=resources), {"demo": shape})
        return next((work.disk, work.temporary) for work in works if work.stage == "collect_gradients")

    layer = 4 * sum(m.shape[0] ** 2 for m in shape.matrices if m.layer == 0) / 2  # of sums, by half in float32
    assert forecast_disk("stream") == (forecast_disk("whole")[0], disk.states + twice * layer)


@pytest.mark.parametrize("windows", [3, COUNT])
def test_a_job_that_is_killed_anywhere_goes_on_to_the_same_bytes(model, windows, tmp_path, monkeypatch):
    """Before every change of a file, it is killed: another one goes on from the files that were there, and adds nothing twice."""
    bound, place, added = windows * model().window, tmp_path / "job", [0]
    accumulate = OutputMoments.accumulate

    def counted(*given):
        added[0] += 1
        return accumulate(*given)

    monkeypatch.setattr(OutputMoments, "accumulate", counted)
    place.mkdir()
    seen: list[int] = []

    def copied() -> None:
        shutil.copytree(place, tmp_path / f"{len(seen)}")
        seen.append(added[0])

    with monkeypatch.context() as patched:
        Disk(place, patched, copied)
        whole = model().job(place, bound)
    every = added[0]
    assert len(seen) > 30
    of_a_layer = len(FEW) * math.ceil(windows / BATCH)
    for killed, before in enumerate(seen):
        added[0], there = 0, tmp_path / f"{killed}"
        with monkeypatch.context() as patched:
            disk = Disk(there, patched)
            assert model().job(there, bound) == whole, killed
        assert every <= before + added[0] <= every + of_a_layer, "only the sums of one layer are added again"
        assert disk.states <= bound
        shutil.rmtree(there)


class Killed(Exception):
    pass


@pytest.mark.parametrize("often", [12, 17])
def test_a_job_that_is_killed_again_and_again(model, often, tmp_path, monkeypatch):
    bound = 2 * model().window
    whole, place, changes = model().job(tmp_path / "whole", bound), tmp_path / "job", [0]

    def die() -> None:
        changes[0] += 1
        if changes[0] % often == 0:
            raise Killed

    with monkeypatch.context() as patched:
        Disk(place, patched, die)
        for _ in range(100):
            try:
                found = model().job(place, bound)
                break
            except Killed:
                continue
    assert changes[0] > 5 * often
    assert found == whole


def kill_in_second_portion(made, place: Path, monkeypatch) -> None:
    """A job of portions of two windows, killed when the second portion has added the sums of a layer."""

    def die() -> None:
        if list(place.glob(".manifest.json.hidden-1-sums-1")):
            raise Killed

    with monkeypatch.context() as patched, pytest.raises(Killed):
        Disk(place, patched, die)
        made.job(place, 2 * made.window)


def test_sums_of_other_portions_are_not_used(model, tmp_path, monkeypatch):
    """Another bound after a kill: what was added by then is of other windows."""
    place = tmp_path / "job"
    whole = model().job(tmp_path / "whole", 4 * model().window)
    kill_in_second_portion(model(), place, monkeypatch)
    assert model().job(place, 4 * model().window) == whole


def test_the_state_of_a_job_without_portions_starts_over(model, tmp_path, monkeypatch):
    """An earlier version of the code left it; it says nothing of where portions start."""
    place = tmp_path / "job"
    whole = model().job(tmp_path / "whole", 2 * model().window)
    kill_in_second_portion(model(), place, monkeypatch)
    state = place / ".manifest.json.hidden.json"
    write_json(state, {key: value for key, value in read_json(state).items() if key not in ("starts", "seal")})
    assert model().job(place, 2 * model().window) == whole


def test_a_layer_that_lost_its_sums_is_added_again_alone(model, tmp_path, monkeypatch):
    """Of a damaged file, all portions; the layers that have them keep theirs."""
    place = tmp_path / "job"
    whole = model().job(tmp_path / "whole", 2 * model().window)
    kill_in_second_portion(model(), place, monkeypatch)
    (damaged,) = place.glob(".manifest.json.hidden-*-sums-2")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert model().job(place, 2 * model().window) == whole


def test_portions_are_equal_whole_batches_within_the_bound():
    for count, batch, most in ((256, 1, 43), (256, 4, 43), (7, 2, 4), (7, 2, 3), (7, 2, 1), (5, 8, 5), (5, 8, 3), (1, 1, 1)):
        portions = portions_of(count, batch, 10, 10 * most + 9)
        assert [n for portion in portions for n in range(portion.start, portion.stop)] == list(range(count))
        sizes = [portion.stop - portion.start for portion in portions]
        assert max(sizes) <= most
        assert most < batch or all(portion.start % batch == 0 for portion in portions)
        fewest = math.ceil(count / (most - most % batch if most >= batch else most)) if most < count else 1
        assert len(portions) <= fewest
    assert portions_of(256, 1, 10, 430) == [slice(n, min(n + 43, 256)) for n in range(0, 256, 43)]
    assert portions_of(3, 2, 10, 1) == [slice(0, 1), slice(1, 2), slice(2, 3)], "a window at least"
    assert portions_of(3, 2, 10, ONE) == [slice(0, 3)]


def test_the_bound_is_what_a_run_sets_or_half_of_the_model():
    assert hidden_bound(200, 10**12) == 200e6
    assert hidden_bound(0, 10**9) == LEAST == 4e9
    assert hidden_bound(0, 16 * 10**9) == 8e9
    assert [states_at_once(blocks) for blocks in (1, 2, 3, 4, 6, 32, 80)] == [2, 3, 3, 4, 5, 11, 17]
