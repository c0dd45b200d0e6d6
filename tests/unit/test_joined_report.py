"""The page of all papers: from finished folders alone, self-contained, and refused where a folder is not whole."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from matplotlib.figure import Figure

from winnow.errors import InputError
from winnow.io.artifacts import write_manifest, write_text
from winnow.reporting.figures import save
from winnow.reporting.html import render_studies
from winnow.studies.claims import FAILS, HOLDS, UNTESTED, VERDICTS, Answer, Claim, judge

DESCRIBED = {
    name: {"title": f"Study {name}", "reference": f"paper <{name}>", "tables": ["numbers"], "figures": ["line"]}
    for name in ("one", "two")
}


def claim(name: str, **check) -> Claim:
    about = {"study": name, "where": "table 1", "says": f"{name} is <best>", "measured": "all of it", "unit": "nats"}
    return Claim.model_validate({"id": f"{name}_{len(check)}_{check['kind']}", **about, "check": check})


def folder_of(root, name: str, value: float, rows: bool = True) -> str:
    """A finished folder, as the rule `conclude_study` leaves it; without `rows`, of a study that found no model."""
    folder = root / name
    claims = [claim(name, kind="bound", most=0), claim(name, kind="untestable", reason="no hardware")]
    frames = {
        "claims": judge(claims, {claims[0].id: {"m": Answer(value, 0.1)}}),
        "identities": pd.DataFrame([{"model": "m", "identity": "a = b", "residual": 3e-15}]),
        "numbers": pd.DataFrame([{"layer": 3, "loss": value}]),
    }
    if not rows:
        frames |= {"identities": pd.DataFrame([]), "numbers": pd.DataFrame([])}
    for table, frame in frames.items():
        write_text(folder / f"{table}.csv", frame.to_csv(index=False))
    figure = Figure()
    figure.subplots().plot([0, 1], [value, 2], label="a line", clip_on=True)
    provenance = {
        "rule": "conclude_study",
        "params": {
            "spec": {
                "measured": {"m": f"results/m/{name}.json"},
                "rows": [
                    {"model": "m", "method": "svd", "budget": "ffn", "recovery": "none", "result": f"results/m/{name}-svd.json"}
                ],
            },
            "versions": {"numpy": "1.2.3"},
        },
    }
    save(figure, [str(folder / "line.svg")], provenance)
    write_manifest(folder, {"study": name}, provenance)
    return str(folder / "manifest.json")


class Page(HTMLParser):
    """Ids, links and text of a page, and which elements stand open at its end."""

    VOID = {"meta", "br", "img", "link"}

    def __init__(self, text: str):
        super().__init__()
        self.ids, self.links, self.open, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found[key] for key in ("href", "src", "xlink:href") if key in found]
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_all_papers_on_one_page(tmp_path):
    page = render_studies([folder_of(tmp_path, "one", -1.0), folder_of(tmp_path, "two", 1.0)], DESCRIBED, VERDICTS)
    read = Page(page)
    assert not read.open
    assert len(read.ids) == len(set(read.ids)), "an id of one figure is of no other"
    assert all(link.startswith("#") for link in read.links), "nothing is asked of a network"
    assert {link[1:] for link in read.links} <= set(read.ids)
    summary = re.search(r'id="summary".*?</table>', page, re.DOTALL).group()
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in summary.split("<tr>")[2:]]
    assert [row[-3:] for row in rows] == [["1", "1", "3.0e-15"]] * 2
    columns = [re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", summary)]
    assert columns[1 : 1 + len(VERDICTS)] == ["1" if verdict in (HOLDS, UNTESTED) else "" for verdict in VERDICTS]
    assert columns[-len(VERDICTS) :] == ["1" if verdict in (FAILS, UNTESTED) else "" for verdict in VERDICTS]
    for expected in (
        "2 papers, 4 claims",
        "paper <two>",
        "one is <best>",
        "results/m/two-svd.json",
        "numpy 1.2.3",
        "no hardware",
    ):
        assert expected in " ".join(read.text.split())
    assert "nan" not in read.text


def test_a_study_that_found_no_model_has_no_rows(tmp_path):
    read = Page(render_studies([folder_of(tmp_path, "one", 0.0, rows=False)], DESCRIBED, VERDICTS))
    assert "What must hold exactly" not in read.text
    assert "0 rows" in read.text


def test_a_changed_folder_is_refused(tmp_path):
    manifest = folder_of(tmp_path, "one", 1.0)
    (tmp_path / "one" / "numbers.csv").write_text("layer,loss\n3,0.5\n")
    with pytest.raises(InputError, match=r"numbers.csv: changed since it was written"):
        render_studies([manifest], DESCRIBED, VERDICTS)
