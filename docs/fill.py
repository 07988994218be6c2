"""Fills in what pages take from the program; `make pages` runs it, and a test compares.

The text between ``<!-- from NAME -->`` and ``<!-- end -->`` is made anew. `SOURCES` lists the names. Such text is
committed, so a page reads well on a code host. The reference is not: Sphinx makes it from docstrings (api.rst).
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from unittest import mock

from hpcavg.algorithms import catalogue
from hpcavg.cli import parsers

_FILLED = re.compile(r"(<!-- from (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> dict[Path, str]:
    """Return what each page should hold."""
    paths = sorted(Path(__file__).parent.glob("*.md"))
    return {path: _FILLED.sub(_fill, path.read_text()) for path in paths if not path.is_symlink()}


def _fill(match: re.Match[str]) -> str:
    return f"{match[1]}\n{SOURCES[match[2]]()}\n{match[3]}"


def train_help() -> str:
    """Return what `python -m hpcavg --help` prints on a terminal of 100 columns."""
    with mock.patch.dict(os.environ, COLUMNS="100"):
        return f"```text\n{parsers.train_parser().format_help()}```\n"


def algorithm_table() -> str:
    """Return the table of all algorithms."""
    return f"{catalogue.markdown_table()}\n"


SOURCES = {"help": train_help, "algorithms": algorithm_table}

if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
