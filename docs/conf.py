"""Sphinx settings. What the pages tell of the program is in them already: fill.py."""

import re

import hpcavg

project = "hpcavg"
author = "the hpcavg developers"
version = release = hpcavg.__version__
extensions = ["myst_parser"]
exclude_patterns = ["_build"]
html_theme = "alabaster"
suppress_warnings = ["myst.xref_missing"]


def setup(app):
    """Let the pages that the first one links to be those of the table of contents."""
    app.connect("source-read", _add_contents)


def _add_contents(app, name, source):
    if name == "index":
        pages = "\n".join(re.findall(r"\]\((\w+)\.md\)", source[0]))
        source[0] += f"\n```{{toctree}}\n:hidden:\n\n{pages}\n```\n"
