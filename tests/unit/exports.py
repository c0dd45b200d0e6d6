"""What tests of all formats of `winnow export` use."""

import sys
from pathlib import Path

import pytest

from winnow.__main__ import main


def refused(tmp_path: Path, checkpoint: Path, monkeypatch, *options: str, form: str) -> str:
    """The line with which the command ends; nothing is written."""
    out = tmp_path / "refused"
    monkeypatch.setattr(sys, "argv", ["winnow", "export", str(checkpoint), str(out), "--format", form, *options])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert not list(tmp_path.glob("*refused*"))
    line = str(stopped.value)
    assert "\n" not in line
    return line
