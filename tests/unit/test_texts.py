"""Texts: formats, rows, and the guard between calibration and evaluation."""

import json
import random

import pandas as pd
import pytest

from winnow.config import Text
from winnow.errors import InputError
from winnow.texts import check_overlap, read_rows


def spec(**given):
    return Text(**given).model_dump()


def words(count, seed):
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(5000)}" for _ in range(count))]


def test_formats_give_the_same_rows(tmp_path):
    rows = ["one two", "", "three\nfour"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": r}) + "\n" for r in rows))
    pd.DataFrame({"body": rows}).to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("|".join(rows))
    for ending, form in (("jsonl", "jsonl"), ("parquet", "parquet")):
        assert read_rows(spec(files=[str(tmp_path / f"a.{ending}")], format=form, column="body")) == rows
    assert read_rows(spec(files=[str(tmp_path / "a.txt")], separator="|")) == rows
    assert read_rows(spec(files=[str(tmp_path / "a.txt")], separator="|", start=2, stop=3)) == rows[2:]


def test_a_data_set_is_read_by_the_datasets_library(tmp_path, monkeypatch):
    """The loading code of hub data sets, on a data set that lies in a folder; and its one-line refusals."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = ["one", "", "three"]
    (tmp_path / "set").mkdir()
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "set" / "test.parquet")
    hub = {"dataset": str(tmp_path / "set"), "split": "test", "revision": "0" * 40}
    assert read_rows(spec(**hub)) == rows
    with pytest.raises(InputError, match="no column 'body'; it has text"):
        read_rows(spec(**hub, column="body"))
    with pytest.raises(InputError, match="neither cached nor to be downloaded") as caught:
        read_rows(spec(dataset="nobody/nothing", split="test", revision="0" * 40))
    assert "\n" not in str(caught.value)


def test_lines_are_rows_as_the_hub_has_wikitext(tmp_path):
    (tmp_path / "w.txt").write_text(" \n = Title = \n \n Body . \n")
    assert read_rows(spec(files=[str(tmp_path / "w.txt")], format="lines")) == ["", " = Title = \n", "", " Body . \n"]


def test_a_line_ends_at_a_line_feed_and_nowhere_else(tmp_path):
    text = "one\u2028two\u0085three\r\nfour\x0bfive\n"
    (tmp_path / "w.txt").write_bytes(text.encode())
    (tmp_path / "w.jsonl").write_text(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    path = str(tmp_path / "w.txt")
    assert read_rows(spec(files=[path])) == [text]
    assert read_rows(spec(files=[path], format="lines")) == ["one\u2028two\u0085three\r\n", "four\x0bfive\n"]
    assert read_rows(spec(files=[str(tmp_path / "w.jsonl")], format="jsonl")) == [text]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"files": ["NUMBERS"], "format": "jsonl"}, "row 1 holds int, not text, in column 'text'"),
        ({"files": ["STRINGS"], "format": "jsonl"}, "not readable as jsonl with column 'text'"),
        ({"files": ["nowhere.txt"]}, "nowhere.txt: there is no such text file"),
        ({"files": ["EMPTY"]}, "no text in rows"),
        ({"files": ["EMPTY"], "format": "jsonl", "column": "body"}, "no text in rows"),
        ({"files": ["BROKEN"], "format": "jsonl"}, "not readable as jsonl"),
    ],
)
def test_bad_texts_are_named(tmp_path, given, message):
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BROKEN").write_text("{'a'\n")
    (tmp_path / "NUMBERS").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "STRINGS").write_text('"a"\n"b"\n')
    files = [str(tmp_path / f) if f.isupper() else f for f in given["files"]]
    with pytest.raises(InputError, match=message):
        read_rows(spec(**{**given, "files": files}))


def test_overlap_is_measured_both_ways():
    own, other = words(4000, 1), words(1000, 2)
    assert check_overlap(own, other, ("a", "b"))["common_runs"] == 0
    with pytest.raises(InputError, match="calibration text a and evaluation text b overlap"):
        check_overlap(own, [*other, " ".join(own[0].split()[:200])], ("a", "b"))
    with pytest.raises(InputError, match=r"100\.0% of the calibration"):
        check_overlap([" ".join(other[0].split()[100:400])], other, ("a", "b"))


def test_overlap_ignores_white_space_and_short_quotations():
    own, other = words(6000, 1), words(6000, 2)
    quoted = own[0].split()
    assert check_overlap(own, [*other, " ".join(quoted[:20])], ("a", "b"))["common_runs"] == 0
    with pytest.raises(InputError, match="overlap"):
        check_overlap(own, ["\n\n".join(quoted)], ("a", "b"))
