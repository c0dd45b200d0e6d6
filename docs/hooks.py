"""What mkdocs does with the pages of this folder, besides rendering them: see mkdocs.yml.

- Pages of the reference are generated from the code (`generated.py`), and the home page is README.md.
- A line that is a link to a CSV file becomes the table; with `#name`, its rows whose first column is `name`.
- Links to files of the checkout that are no pages become their paths, as they are read in an editor or on a code host.
"""

import csv
import logging
import posixpath
import re
from pathlib import Path

from generated import MARKED, pages
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
LOG = logging.getLogger("mkdocs.hooks")
DASH = "\N{EN DASH}"
TABLE = re.compile(r"^\[[^\]]*\]\(([^)#\s]+\.csv)(?:#([^)]+))?\)$", re.MULTILINE)
LINK = re.compile(r"(?P<before>\(?)\[(?P<text>[^\]]+)\]\((?!https?:)(?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
MARK = re.compile(r"^<!-- generated: ([\w. ]+) -->$", re.MULTILINE)


def on_config(config):
    """Put generated pages where the navigation has the folder they are in."""
    config.generated = {**pages(), "index.md": (ROOT / "README.md").read_text(encoding="utf-8")}

    def filled(entries):
        for entry in entries:
            for title, value in entry.items() if isinstance(entry, dict) else ():
                if isinstance(value, list):
                    filled(value)
                elif value.endswith("/"):
                    entry[title] = sorted((name for name in config.generated if name.startswith(value)), key=_index_first)

    filled(config.nav)
    return config


def _index_first(name):
    return (not name.endswith("/index.md"), name)


def on_files(files, config):
    for name, content in config.generated.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown, page, config, files):
    """Tables, generated parts, and links."""
    name = page.file.src_uri
    folder = "." if name == "index.md" else posixpath.join("docs", posixpath.dirname(name))
    markdown = MARK.sub(lambda found: _marked(*found[1].split()), markdown)
    markdown = TABLE.sub(lambda found: table(ROOT / folder / found[1], found[2]), markdown)
    return LINK.sub(lambda found: _link(found, folder, name), markdown)


def _marked(name, *arguments):
    return "\n".join(MARKED[name](*arguments))


def table(path, chosen=None):
    """A CSV file as a Markdown table. A column `x` with one `x error` is shown as value ± error, or a dash if it is empty."""
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    columns = [name for name in rows[0] if not name.endswith(" error")]
    if chosen:
        rows = [row for row in rows if row[columns[0]] == chosen]
        columns = columns[1:]
    assert rows, f"{path}: no rows of {chosen}"
    shown = [f"| {' | '.join(_cell(row, name) for name in columns)} |" for row in rows]
    aligned = ["---:" if f"{name} error" in rows[0] else "---" for name in columns]
    return "\n".join([f"| {' | '.join(columns)} |", f"|{'|'.join(aligned)}|", *shown])


def _cell(row, name):
    if f"{name} error" in row:
        return f"{row[name]} ± {row[f'{name} error']}" if row[name] else DASH
    return f"`{row[name]}`" if name in ("method", "preset") and "`" not in row[name] else row[name]


def _link(found, folder, page):
    """A link from a page, or the path if it leads out of this folder."""
    before, text, target = found["before"], found["text"], posixpath.normpath(posixpath.join(folder, found["target"]))
    anchor = found["anchor"] or ""
    if target == "config/README.md":  # of which the reference has a page per section
        target, anchor = f"docs/reference/configuration/{anchor.removeprefix('#') or 'index'}.md", ""
    if target == "README.md":
        target = "docs/index.md"
    if target.startswith("docs/"):
        target = re.sub(r"\.ipynb$", ".md", target)  # of which there is a page
        return f"{before}[{text}]({posixpath.relpath(target.removeprefix('docs/'), posixpath.dirname(page) or '.')}{anchor})"
    if not (ROOT / target).exists():
        LOG.warning(f"{page}: a link to {found['target']}, which does not exist")
    if text.strip("`") in (target, posixpath.basename(target)):
        return f"{before}`{target}`"
    return f"({text}: `{target}`" if before else f"{text} (`{target}`)"
