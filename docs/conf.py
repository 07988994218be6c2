"""Sphinx settings. The help text in the pages is the program's own, taken when the pages are built."""

from pathlib import Path

import hpcavg
from hpcavg import cli

HERE = Path(__file__).parent
project = "hpcavg"
author = "the hpcavg developers"
version = release = hpcavg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
html_theme = "alabaster"
autodoc_member_order = "bysource"
suppress_warnings = ["myst.xref_missing"]

(HERE / "_generated").mkdir(exist_ok=True)
(HERE / "_generated" / "help.txt").write_text(cli.train_parser().format_help())
