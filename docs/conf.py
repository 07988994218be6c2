"""Sphinx settings. `make docs` builds the site; a warning is an error."""

import re

import hpcavg

project = "hpcavg"
author = "the hpcavg developers"
version = release = hpcavg.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "hpcavg"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

default_role = "code"  # docstrings write `name`
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_google_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 100

# Files outside docs/ that are pages of the site, too.
OUTSIDE = {"jobs/README.md": "jobs.rst", "CONTRIBUTING.md": "contributing.rst", "CHANGELOG.md": "changelog.rst"}


def setup(app):
    """Prepare pages and docstrings for Sphinx, so that their sources stay plain text."""
    app.connect("source-read", lambda app, name, source: prepare_page(name, source))
    app.connect("include-read", lambda app, path, name, source: prepare_page(name, source))
    app.connect("autodoc-process-docstring", put_text_below_names, priority=0)


def prepare_page(name, source):
    """Point links at pages of the site, and make the table of contents from the first page's parts."""
    text = re.sub(r"\]\((?:\.\./)?docs/(\w+\.md)", r"](\1", source[0])
    for path, page in OUTSIDE.items():
        text = re.sub(rf"\]\((\.\./)?{path}", f"]({page}", text)
    if name == "index":
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            pages = "\n".join(re.findall(r"^- \[.*?\]\((\w+)\.\w+\)", part, re.MULTILINE))
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {part.splitlines()[0]}\n\n{pages}\n```\n"
    source[0] = text


def put_text_below_names(app, what, name, obj, options, lines):
    """Put the text of ``name : text`` on a line of its own; napoleon takes it for a type otherwise."""
    section = None
    prepared = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch("-{3,}", following):
            section = line
        item = re.fullmatch(r"([*\w]+) : (.+)", line)
        if item and section in ("Parameters", "Attributes") and not following.startswith(" "):
            prepared += [item[1], f"    {item[2]}"]
        else:
            prepared.append(line)
    lines[:] = prepared
