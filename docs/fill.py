"""Fills in what pages take from the program; `make pages` runs it, and a test compares.

The text between ``<!-- from NAME -->`` and ``<!-- end -->`` is made anew. NAME is ``help``, or a module of hpcavg with
a function ``markdown_table``. Such text is committed, so a page reads well on a code host. The reference is not
committed: Sphinx makes it from docstrings (api.rst).
"""

from __future__ import annotations

import importlib
import os
import re
from pathlib import Path
from unittest import mock

from hpcavg.cli import parsers

_FILLED = re.compile(r"(<!-- from ([\w.]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return what each page should hold."""
    return {path: _FILLED.sub(_fill, path.read_text()) for path in sorted(Path(__file__).parent.glob("*.md"))}


def _fill(match: re.Match[str]) -> str:
    text = _help() if match[2] == "help" else importlib.import_module(match[2]).markdown_table()
    return f"{match[1]}\n{text.rstrip()}\n\n{match[3]}"


def _help() -> str:
    """Return what `python -m hpcavg --help` prints on a terminal of 100 columns."""
    with mock.patch.dict(os.environ, COLUMNS="100"):
        return f"```text\n{parsers.train_parser().format_help()}```"


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
