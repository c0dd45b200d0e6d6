"""Digests of files that no rule makes: remembered by what `stat` says, never by time alone."""

import hashlib
import os
from types import SimpleNamespace

import pytest

from winnow.errors import InputError
from winnow.jobs import start as runtime
from winnow.planning import outside
from winnow.planning.outside import Digests

PAST = 1_000_000_000


@pytest.fixture
def read(monkeypatch):
    """The paths that were read for a digest, in order."""
    paths = []
    whole = outside.file_digest
    monkeypatch.setattr(outside, "file_digest", lambda path: paths.append(path) or whole(path))
    monkeypatch.setattr(outside, "SETTLED", -1.0)  # as if the files of a test had been there for long
    return paths


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def test_a_file_is_read_once_and_again_where_stat_differs(tmp_path, read):
    path, memory = tmp_path / "text.txt", tmp_path / "memory"
    path.write_bytes(b"one")
    for _ in range(3):
        assert Digests(memory).of(path) == digest(b"one")
    assert len(read) == 1
    os.utime(path, (PAST, PAST))
    assert Digests(memory).of(path) == digest(b"one")
    assert len(read) == 2, "another time, so it was read, and its content is the same"
    path.write_bytes(b"two")
    os.utime(path, (PAST, PAST))
    assert Digests(memory).of(path) == digest(b"two"), "the same size and time of content, another time of the inode"


def test_a_link_is_what_it_leads_to(tmp_path, read):
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
        os.utime(tmp_path / name, (PAST, PAST))
    link = tmp_path / "link"
    for name in ("one", "two", "one"):
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / name)
        assert Digests(tmp_path / "memory").of(link) == digest(name.encode())


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path, monkeypatch):
    """Two writes can fall into one tick of the clock, and then all that stat says is the same."""
    path = tmp_path / "text.txt"
    path.write_bytes(b"one")
    assert Digests(tmp_path / "memory").of(path) == digest(b"one")
    assert not (tmp_path / "memory").exists()


def test_a_cut_memory_costs_a_digest_and_a_read_only_one_as_well(tmp_path, read, monkeypatch):
    path, memory = tmp_path / "text.txt", tmp_path / "memory"
    path.write_bytes(b"one")
    Digests(memory).of(path)
    (entry,) = memory.iterdir()
    entry.write_text(entry.read_text()[:20])
    assert Digests(memory).of(path) == digest(b"one")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    path.write_bytes(b"two")
    assert Digests(memory).of(path) == digest(b"two")
    assert list(memory.iterdir()) == [entry]


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InputError, match=r"gone\.txt: cannot be read \(No such file or directory\)"):
        Digests(tmp_path).of(tmp_path / "gone.txt")


def test_a_job_reads_what_it_was_planned_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_bytes(b"one")
    planned = {"text.txt": digest(b"one")}
    assert runtime._inputs(["text.txt", "absent"], planned) == planned
    (tmp_path / "text.txt").write_bytes(b"two")
    with pytest.raises(InputError, match=r"text\.txt: changed since this run was planned; run snakemake again"):
        runtime._inputs(["text.txt"], planned)


def test_a_download_has_digests_only_where_it_is_not_what_was_retrieved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    from winnow.io.artifacts import write_json

    grid = SimpleNamespace(tuned=lambda label: False, preset=lambda section, label: SimpleNamespace(local=lambda: False))

    def files():
        return outside.Outside(grid).model("far-123456", "model.json")

    assert files() == {}, "not retrieved yet"
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_bytes(b"one")

    def retrieved():
        provenance = {"wildcards": {"model": "far-123456"}, "params": {"files": files()}}
        content = {"directory": str(snapshot), "files": {"config.json": digest((snapshot / "config.json").read_bytes())}}
        write_json("results/far-123456/model.json", content, provenance)

    retrieved()
    assert files() == {}
    (snapshot / "config.json").write_bytes(b"two")
    changed = files()
    assert changed == {str(snapshot / "config.json"): digest(b"two")}
    retrieved()
    assert files() == changed, "what its record says, so nothing is to be done again"
    (snapshot / "config.json").unlink()
    assert files() == {str(snapshot / "config.json"): "absent"}
