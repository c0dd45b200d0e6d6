"""Texts: formats, rows, and the guard between calibration and evaluation."""

import json
import random

import pandas as pd
import pytest
from pydantic import ValidationError

from tests.unit.test_plan import plan_of
from winnow.data.texts import check_overlap, read_rows
from winnow.errors import InputError
from winnow.planning.config import Text


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


def test_the_ending_says_the_format_where_nothing_else_does(tmp_path):
    """Rows of jsonl read as plain text have braces and keys for words: a perplexity of 142 in the place of 41."""
    rows = ["one two", "", "three\nfour"]
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "d", "e.json"):
        (tmp_path / name).write_text("".join(json.dumps({"text": r}) + "\n" for r in rows))
    pd.DataFrame({"text": rows}).to_parquet(tmp_path / "a.parquet")
    for name in ("a.jsonl", "b.JSONL", "c.ndjson", "a.parquet"):
        assert read_rows(spec(files=[str(tmp_path / name)])) == rows
    assert read_rows(spec(files=[str(tmp_path / "a.jsonl"), str(tmp_path / "c.ndjson")])) == rows * 2
    for name in ("d", "e.json"):  # names that say nothing, or not enough
        assert read_rows(spec(files=[str(tmp_path / name)], format="jsonl")) == rows
    (tmp_path / "w.txt").write_text("one\ntwo\n")
    for files in (["w.txt"], ["w.txt", "w.txt"]):
        assert read_rows(spec(files=[str(tmp_path / name) for name in files])) == ["one\ntwo\n"] * len(files)


CONTRADICTIONS = [
    (
        {"files": ["x.jsonl"], "format": "raw"},
        "x.jsonl: `format: raw` contradicts the file's ending; remove `format`, or rename",
    ),
    ({"files": ["x.jsonl"], "format": "lines"}, "x.jsonl: `format: lines` contradicts the file's ending"),
    ({"files": ["x.parquet"], "format": "lines"}, "x.parquet: `format: lines` contradicts the file's ending"),
    ({"files": ["x.parquet"], "format": "jsonl"}, "x.parquet: `format: jsonl` contradicts the file's ending"),
    ({"files": ["x.txt", "y.jsonl"], "format": "lines"}, "y.jsonl: `format: lines` contradicts the file's ending"),
    ({"files": ["x.json"]}, "x.json: if it has one object per line, set `format: jsonl`; if it is one list, convert it to that"),
    ({"files": ["x.json"], "format": "lines"}, "x.json: if it has one object per line, set `format: jsonl`"),
    (
        {"files": ["a/wiki.test.raw"]},
        "a/wiki.test.raw: set `format: lines` for the rows of WikiText as papers use them, or `raw` for",
    ),
    ({"files": ["x.jsonl.gz"]}, "x.jsonl.gz: compressed files are not supported; decompress it"),
    ({"files": ["x.jsonl.gz"], "format": "jsonl"}, "x.jsonl.gz: compressed files are not supported; decompress it"),
    ({"files": ["x.CSV"]}, "x.CSV: tables are only read from parquet or jsonl; convert its text column to one of these"),
    ({"files": ["x.csv"], "format": "lines"}, "x.csv: tables are only read from parquet or jsonl"),
    (
        {"files": ["x.jsonl", "y.txt"]},
        "the files have different formats (x.jsonl as jsonl, y.txt as raw); use one text for each, or set `format` if it",
    ),
    ({"files": ["x.txt"], "format": "text"}, "Input should be 'raw', 'lines', 'jsonl' or 'parquet'"),
    (
        {"files": ["x.txt"], "column": "body"},
        "`column` is for jsonl and parquet, but x.txt is read as raw; set its `format`",
    ),
    (
        {"files": ["x.jsonl"], "separator": "|"},
        "`separator` splits raw files into rows, but x.jsonl is read as jsonl; remove one of",
    ),
    ({"dataset": "x", "split": "test", "revision": "0" * 40, "format": "lines"}, "`format` is only for local files; remove it"),
]


@pytest.mark.parametrize(("given", "message"), CONTRADICTIONS, ids=[str(given) for given, _ in CONTRADICTIONS])
def test_a_format_that_is_not_that_of_the_files_is_refused(given, message):
    with pytest.raises(ValidationError) as caught:
        Text(**given)
    assert message in caught.value.errors()[0]["msg"]


def test_a_format_that_is_seen_is_in_the_label_as_if_it_had_been_said():
    def labels(**text):
        return plan_of(lambda c: c["texts"].update(mine=text)).labels["texts"]["mine"]

    assert labels(files=["x.jsonl"]) == labels(files=["x.jsonl"], format="jsonl")
    assert labels(files=["x.txt"]) == labels(files=["x.txt"], format="raw")
    assert labels(files=["x.txt"]) != labels(files=["x.txt"], format="lines")
    assert labels(files=["wiki.test.raw"], format="lines") != labels(files=["wiki.test.raw"], format="raw")
    found = plan_of().labels["texts"]  # of results that people have
    assert list(found.values()) == ["demo_calibration-a3d11f", "demo_evaluation-2487b0"]


@pytest.mark.parametrize(("given", "refused"), [({}, True), ({"format": "lines"}, True), ({"format": "raw"}, False)], ids=str)
def test_lines_of_objects_are_not_read_as_plain_text_unasked(tmp_path, given, refused):
    file = tmp_path / "rows.txt"
    file.write_text('\n{"text": "one"}\n{"text": "two", "id": 3}\n')
    text = {"files": [str(file)], **given}
    plan = plan_of(lambda c: c["texts"].update(demo_calibration=text))
    if not refused:
        plan.cells.check_sources()
        return
    with pytest.raises(InputError) as caught:
        plan.cells.check_sources()
    cure = "say `format: jsonl` to read a column of them, or `format: raw` if braces and keys are part of the text"
    assert str(caught.value) == f"texts.demo_calibration: {file}: its lines are JSON objects; {cure}"
    for content in ('["a", "b"]\n', "{ a set }\n{ another }\n", '{"text": "one"}\nand prose\n', "", "\x00\xff"):
        file.write_text(content, encoding="latin-1")
        plan.cells.check_sources()


def test_a_file_that_no_file_can_be_called_is_not_there():
    for change in (
        lambda c: c["texts"].update(demo_calibration={"files": ["n" * 260]}),
        lambda c: c["models"]["demo"].update(source="n" * 260),
    ):
        with pytest.raises(InputError, match=r"n{260}: there is no such"):
            plan_of(change).cells.check_sources()


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
    with pytest.raises(InputError, match="not cached, and cannot be downloaded") as caught:
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
        ({"files": ["NUMBERS"], "format": "jsonl"}, "row 1 has int, not text, in column 'text'"),
        ({"files": ["STRINGS"], "format": "jsonl"}, "not readable as jsonl with column 'text'"),
        ({"files": ["nowhere.txt"]}, "nowhere.txt: there is no such text file"),
        ({"files": ["EMPTY"]}, "no text in rows"),
        ({"files": ["EMPTY"], "format": "jsonl", "column": "body"}, "no text in rows"),
        ({"files": ["BROKEN"], "format": "jsonl"}, "not readable as jsonl"),
        (
            {"files": ["BROKEN"], "format": "jsonl"},
            r"BROKEN: not readable as jsonl with column 'text' \(line 2: Expecting property",
        ),
        ({"files": ["STRINGS"], "format": "jsonl"}, r"\(line 1: an object is needed, not str\)"),
        ({"files": ["NUMBERS"], "format": "jsonl", "column": "body"}, r"\(line 1: there is no column 'body'; it has text\)"),
        ({"files": ["TABLE"], "format": "parquet", "column": "body"}, r"\(there is no column 'body'; it has text, id\)"),
        ({"files": ["STRINGS"], "format": "parquet"}, "STRINGS: not readable as parquet with column 'text'"),
        (
            {"files": ["HALF"], "format": "jsonl"},
            r"HALF: row 1 contains \\ud83d, a lone surrogate, which is not a character",
        ),
        ({"files": ["DEEP"], "format": "jsonl"}, r"DEEP: not readable as jsonl with column 'text' \(line 2: nested too deep"),
        ({"files": ["TWICE"], "format": "jsonl"}, r"\(line 2: duplicate key 'text' in an object\)"),
    ],
)
def test_bad_texts_are_named(tmp_path, given, message):
    pd.DataFrame({"text": ["a"], "id": [1]}).to_parquet(tmp_path / "TABLE")
    (tmp_path / "HALF").write_text('{"text": "a"}\n{"text": "b \\ud83d c"}\n')
    (tmp_path / "DEEP").write_text('{"text": "a"}\n{"text": ' + "[" * 10**5 + "]" * 10**5 + "}\n")
    (tmp_path / "TWICE").write_text('{"text": "a"}\n{"text": "b", "text": "c"}\n')
    (tmp_path / "EMPTY").write_text("")
    (tmp_path / "BROKEN").write_text("\n{'a'\n")
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
