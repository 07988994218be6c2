"""Tables in Markdown, for the pages that take text from the program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

BAR = r"\|"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; bars inside cells are escaped.

    Examples
    --------
    >>> print(table(("name", "unit"), [("bytes", "byte")]))
    | name | unit |
    |---|---|
    | bytes | byte |
    """
    lines = [f"| {' | '.join(cell.replace('|', BAR) for cell in cells)} |" for cells in (header, *rows)]
    lines.insert(1, f"|{'---|' * len(header)}")
    return "\n".join(lines)
