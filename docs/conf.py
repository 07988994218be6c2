"""Sphinx settings. `make docs` builds the site; a warning is an error."""

import re
from pathlib import Path

import hpcavg

HERE = Path(__file__).parent
# A page that is only a link to a file outside docs/ shows that file.
LINKED = {
    match[1]: path.name
    for path in HERE.glob("*.md")
    if (match := re.fullmatch(r"\[.*\]\(\.\./(.+)\)\n", path.read_text()))
}
LONGEST_TYPE = 60

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
napoleon_custom_sections = [("Attributes", "params_style")]
napoleon_use_rtype = False
python_maximum_signature_line_length = 100


def setup(app):
    """Prepare pages and docstrings for Sphinx, so their sources stay plain text."""
    app.connect("source-read", prepare_page)
    app.connect("autodoc-process-docstring", put_text_below_names, priority=0)


def prepare_page(app, name, source):
    """Fill in linked files, point links at pages of the site, and make the table of contents of the first page."""
    text = source[0]
    for path, page in LINKED.items():
        if page == f"{name}.md":
            app.env.note_dependency(HERE.parent / path)
            text = (HERE.parent / path).read_text()
    text = re.sub(r"\]\((?:\.\./)?docs/(\w+\.md)", r"](\1", text)
    for path, page in LINKED.items():
        text = re.sub(rf"\]\((\.\./)?{path}", f"]({page}", text)
    text = re.sub(r"\[\S+\.md\]\(", "[](", text)  # a link that shows a file's name shows the page's title
    if name == "index":
        for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
            pages = "\n".join(re.findall(r"^- \[.*?\]\((\w+)\.\w+\)", part, re.MULTILINE))
            text += f"\n```{{toctree}}\n:hidden:\n:caption: {part.splitlines()[0]}\n\n{pages}\n```\n"
    source[0] = text


def put_text_below_names(app, what, name, obj, options, lines):
    """Put the text of ``name : text`` below the name; napoleon takes it for a type otherwise.

    It is a text if nothing is indented below it, or if it is longer than a type and goes on below.
    """
    section = None
    prepared = []
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if re.fullmatch("-{3,}", following):
            section = line
        item = re.fullmatch(r"(\*{0,2}\w+) : (.+)", line)
        is_text = item and (not following.startswith(" ") or len(item[2]) > LONGEST_TYPE)
        if is_text and section in ("Parameters", "Attributes"):
            prepared += [item[1], f"    {item[2]}"]
        else:
            prepared.append(line)
    lines[:] = prepared
