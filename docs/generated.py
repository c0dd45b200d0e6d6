"""Pages, and parts of pages, that are generated from the code when the site is built."""

import ast
import csv
import importlib
import inspect
import json
import os
import tokenize
from io import StringIO
from pathlib import Path
from unittest.mock import patch

from winnow import __main__ as program
from winnow.allocation.base import ALLOCATIONS
from winnow.metrics.base import METRICS
from winnow.planning.config import Config
from winnow.planning.config_files import readme
from winnow.planning.config_tables import protocol_rows, section, structure
from winnow.planning.stages.conclude_study import CLAIMS
from winnow.structures.base import STRUCTURES
from winnow.studies.claims import read_claims

ROOT = Path(__file__).resolve().parents[1]


def pages():
    """{name: Markdown} of the pages that are generated as a whole."""
    made = {"reference/configuration/index.md": _configuration(), "reference/structures/index.md": _structures()}
    for name in Config.model_fields:
        made[f"reference/configuration/{name}.md"] = "\n".join([f"# {name}", "", *section(name)])
    for kind in STRUCTURES:
        made[f"reference/structures/{kind}.md"] = "\n".join([f"# {kind}", "", *structure(kind)])
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb"):
        made[f"notebooks/{path.stem}.md"] = _notebook(path)
    return made


def _notebook(path):
    """A notebook with the text of its outputs."""
    lines = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        lines += ["", source] if cell["cell_type"] == "markdown" else ["", "```python", source, "```"]
        for output in cell.get("outputs", []):
            text = "".join(output.get("text") or output.get("data", {}).get("text/plain", ""))
            lines += ["", "```text", text.rstrip(), "```"]
    return "\n".join(lines)


def _configuration():
    introduction = readme().partition("\n## ")[0].split("\n\n", 2)[2]
    rows = [f"| [{name}]({name}.md) | {field.description} |" for name, field in Config.model_fields.items()]
    return "\n".join(["# Sections", "", introduction, "", "| section | what is in it |", "|---|---|", *rows])


def _structures():
    rows = [f"| [{kind}]({kind}.md) | {cls.stores} | {cls.formula} |" for kind, cls in STRUCTURES.items()]
    about = "A structure is what is stored instead of matrices. m and n are the outputs and inputs of a matrix, d and f the width"
    more = "and the hidden width of an FFN, k is the size that a budget determines."
    return "\n".join(["# Structures", "", about, more, "", "| kind | stores | numbers stored |", "|---|---|---|", *rows])


def _commands():
    """The help of every command of the program, as it prints it."""
    with patch.dict(os.environ, COLUMNS="84"):
        parser = program.parser()
        (commands,) = (action.choices for action in parser._actions if isinstance(action.choices, dict))
        lines = ["```text", parser.format_help().rstrip(), "```"]
        for name, command in commands.items():
            lines += ["", f"## {name}", "", "```text", command.format_help().rstrip(), "```"]
    return lines


def _fields(module):
    """A table of fields for every type in a module of TypedDicts, with the comments beside them."""
    source = inspect.getsource(importlib.import_module(module))
    tokens = tokenize.generate_tokens(StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("#: ") for token in tokens if token.type == tokenize.COMMENT}
    lines = []
    for node in ast.parse(source).body:
        body = [part for part in getattr(node, "body", []) if isinstance(part, ast.AnnAssign)]
        fields = [part for part in body if not ast.unparse(part.target).startswith("_")]
        if not isinstance(node, ast.ClassDef) or not fields:
            continue
        bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "TypedDict"]
        also = [f"And the fields of {', '.join(f'`{base}`' for base in bases)}."] if bases else []
        about = " ".join(filter(None, [ast.get_docstring(node), *also]))
        lines += ["", f"### {node.name}", "", " ".join(about.split()), "", "| field | type | meaning |", "|---|---|---|"]
        for part in fields:
            kind = ast.unparse(part.annotation).replace("|", "\\|")
            lines.append(f"| `{ast.unparse(part.target)}` | `{kind}` | {comments.get(part.end_lineno, '')} |")
    return lines


def _claims(study):
    """A table of the claims of a study's paper, from resources/claims.yaml, with what was found on the demo model."""
    with open(ROOT / "docs" / "results" / "claims.csv", newline="", encoding="utf-8") as stream:
        found = list(csv.DictReader(stream))
    lines = ["| claim | number | what was found | what is measured | why it can differ |", "|---|---|---|---|---|"]
    for claim in read_claims(ROOT / CLAIMS):
        if claim.study == study:
            number = "" if claim.number is None else f"{claim.number:g} {claim.unit}"
            own = "<br>".join(_verdict(row) for row in found if row["id"] == claim.id)
            lines.append(f"| {claim.says} | {number} | {own} | {claim.measured} | {claim.differs} |")
    return lines


def _verdict(row):
    """What a study found for a claim on one model."""
    value = f" {float(row['value']):.4g}" if row["value"] else ""
    error = f" ± {float(row['error']):.2g}" if value and float(row["error"] or 0) else ""
    return f"{row['model']}:{value}{error} **{row['verdict']}**"


def _kinds(which):
    """A line for every metric or allocation."""
    registry = {"metrics": METRICS, "allocations": ALLOCATIONS}[which]
    return [f"- `{kind}`: {' '.join(str(cls.__doc__).split())}" for kind, cls in registry.items()]


MARKED = {"commands": _commands, "fields": _fields, "claims": _claims, "protocols": protocol_rows, "kinds": _kinds}
