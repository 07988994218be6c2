"""HTML pages: elements that escape their text, tables, and a style for light and dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

from hpcavg.utils.text import printable

_STYLE = """
:root { color-scheme: light dark; --text: #1c1e21; --back: #ffffff; --soft: #6a7078; --line: #dcdfe3; --block: #f5f6f8;
  --good: #17743a; --bad: #b3261e; --link: #0b57b0; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6e9; --back: #15181c; --soft: #9aa1aa; --line: #33383f;
  --block: #1e2227; --good: #6cc98b; --bad: #ff8a80; --link: #8ab8f5; } }
body { max-width: 62rem; margin: 2rem auto 4rem; padding: 0 1.25rem; font: 16px/1.5 system-ui, sans-serif;
  color: var(--text); background: var(--back); }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
a { color: var(--link); }
p { margin: .5rem 0; }
.soft { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.wide { overflow-x: auto; margin: .75rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
thead th { border-bottom-width: 2px; vertical-align: bottom; }
.figures td, .figures thead th + th { text-align: right; white-space: nowrap; }
.figures tbody th { font-weight: 400; white-space: nowrap; }
.sides td:nth-child(-n + 3), .sides thead th:nth-child(-n + 3), .sides :last-child { text-align: left; }
td small { display: block; color: var(--soft); font-size: .75rem; }
pre { background: var(--block); border-radius: 6px; padding: .6rem .8rem; overflow-x: auto;
  font: .8rem/1.45 ui-monospace, monospace; }
pre.command { white-space: pre-wrap; }
pre.command span { display: inline-block; max-width: 100%; overflow-wrap: anywhere; }
td.long { overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; margin: .5rem 0; }
summary { cursor: pointer; color: var(--link); }
"""

Content = str | Element


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """Return an element; ``class_`` is its class. Texts are escaped, unprintable characters too."""
    found = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            found.append(part)
        elif len(found):
            found[-1].tail = (found[-1].tail or "") + _clean(part)
        else:
            found.text = (found.text or "") + _clean(part)
    return found


def table(heads: Sequence[Content], rows: Iterable[Sequence[Content]], class_: str = "plain") -> Element:
    """Return a table that scrolls if the page is too narrow. The first cell of a row is its head.

    A cell is a text, a ``td`` element, or an element that is put into one.
    """
    head = element("thead", element("tr", *(_cell("th", text) for text in heads)))
    body = [element("tr", _cell("th", first), *(_cell("td", cell) for cell in rest)) for first, *rest in rows]
    return element("div", element("table", head, element("tbody", *body), class_=class_), class_="wide")


def page(title: str, content: Iterable[Content]) -> bytes:
    """Return a page as bytes."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", _STYLE),
    )
    root = element("html", head, element("body", element("h1", title), *content), lang="en")
    text = ElementTree.tostring(root, encoding="utf-8", method="html").replace(b"</source>", b"")  # of Python 3.10
    return b"<!doctype html>\n" + text + b"\n"


def _cell(tag: str, content: Content) -> Element:
    if isinstance(content, Element) and content.tag in ("td", "th"):
        return content
    return element(tag, content)


def _clean(text: str) -> str:
    """Return `text` with unprintable characters escaped, except line ends."""
    return "\n".join(printable(line, 10_000) for line in text.split("\n"))
