"""Compare two suites, or two JSON files of one benchmark.

    python -m benchmarks.compare A B [--output FOLDER or FILE.html]

Shows A, B and B/A for every figure that both have. If the 95 % intervals of the medians do not overlap, B is better or
worse: chance alone separates them in less than one figure of a hundred. This holds for these two runs only; another
allocation may differ more. Figures of fewer than 6 values have no interval and are not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from benchmarks import html
from benchmarks.figures import Figure, scale, texts
from benchmarks.html import Content, element
from benchmarks.options import Parser, run
from benchmarks.results import ENVIRONMENT, Record, read_any
from hpcavg.errors import InputError, why
from hpcavg.utils import files
from hpcavg.utils.progress import is_terminal
from hpcavg.utils.text import counted, printable

# What B can be, and its style on a terminal and on the page.
VERDICTS = {"better": ("green", "good"), "worse": ("red", "bad"), "same": ("", ""), "unjudged": ("dim", "soft")}
_HEADS = ("benchmark", "", "figure", "A", "B", "B/A", "B is")

Records = Mapping[str, Record]


@dataclass(frozen=True)
class Comparison:
    """A figure that both have.

    Attributes
    ----------
    name : the name of the run.
    row : of the table.
    column : of the table.
    a : the figure of A.
    b : the figure of B.
    """

    name: str
    row: str
    column: str
    a: Figure
    b: Figure

    @property
    def ratio(self) -> float | None:
        """B's median over A's; None unless both are positive and finite."""
        a, b = self.a.median, self.b.median
        return b / a if 0 < a < float("inf") and 0 < b < float("inf") else None

    @property
    def verdict(self) -> str:
        """A key of `VERDICTS`: whether B's median differs from A's, and how."""
        overlap = self.a.overlaps(self.b)
        if overlap is None:
            return "unjudged"
        if overlap:
            return "same"
        return "better" if (self.b.median > self.a.median) == (self.a.better == "more") else "worse"

    def cells(self) -> list[str]:
        """Return the row of the table under `_HEADS`."""
        factor, unit = scale([self.a, self.b])
        sides = (texts(figure, factor) for figure in (self.a, self.b))
        a, b = (f"{median} ({spread})" if spread else median for median, spread in sides)
        ratio = "" if self.ratio is None else f"{self.ratio:.3f}"
        return [self.name, self.row, f"{self.column}, {unit}" if unit else self.column, a, b, ratio, self.verdict]


@dataclass(frozen=True)
class Compared:
    """The result of a comparison.

    Attributes
    ----------
    sides : the names of A and B.
    figures : the figures that both have.
    differing : what else differs, with A's and B's value.
    lacking : ``"A"`` or ``"B"``, and what only that one has.
    """

    sides: dict[str, str]
    figures: list[Comparison]
    differing: list[tuple[str, str, str]]
    lacking: list[tuple[str, str]]

    @property
    def totals(self) -> str:
        """A line on how many figures are better, worse and so on."""
        better, worse, same, unjudged = (sum(each.verdict == verdict for each in self.figures) for verdict in VERDICTS)
        return (
            f"Of {counted(len(self.figures), 'figure')} B has {better} better and {worse} worse, their intervals apart;"
            f" {same} with overlapping intervals: no difference shown; {unjudged} with too few values to judge"
        )


def main() -> None:
    """Print the comparison; write its page with ``--output``."""
    parser = Parser(__doc__)
    parser.add_argument("a", type=Path, metavar="A", help="folder of a suite, or a benchmark's JSON file")
    parser.add_argument("b", type=Path, metavar="B", help="the other folder or file")
    parser.add_argument("--output", type=Path, metavar="PATH", help="page to write: FILE.html, or a folder")
    options = parser.parse_args()
    (a, a_variables), (b, b_variables) = read_any(options.a), read_any(options.b)
    variables = differing("", a_variables, b_variables) if a_variables and b_variables else ()
    compared = Compared(
        sides={"A": str(options.a), "B": str(options.b)},
        figures=list(comparisons(a, b)),
        differing=[*differences(a, b), *variables],
        lacking=[*(("A", line) for line in lacking(a, b)), *(("B", line) for line in lacking(b, a))],
    )
    if not compared.figures:
        raise InputError("b", options.b, f"with figures that {options.a} has, too")
    _print(compared)
    if options.output is not None:
        _write(options.output, compared)


def comparisons(a: Records, b: Records) -> Iterator[Comparison]:
    """Yield every figure that both have."""
    for name in a:
        if name in b:
            theirs = b[name].figures
            for (row, column), figure in a[name].figures.items():
                if (row, column) in theirs:
                    yield Comparison(name, row, column, figure, theirs[row, column])


def differences(a: Records, b: Records) -> Iterator[tuple[str, str, str]]:
    """Yield the differences of environments and, for runs that both have, of options: name, A's and B's value."""
    yield from differing("", *map(_environment, (a, b)))
    for name in a:
        if name in b:
            yield from differing(f"{name} --", *(_options(records[name]) for records in (a, b)))


def _environment(records: Records) -> dict[str, object]:
    where: Mapping[str, object] = next((record.environment for record in records.values()), {})
    return {name: where.get(key) for key, name in ENVIRONMENT.items()}


def _options(record: Record) -> dict[str, object]:
    return {key.replace("_", "-"): value for key, value in record.options.items() if key != "json"}


def differing(prefix: str, a: Mapping[str, object], b: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield the keys, after `prefix`, whose values differ in `a` and `b`, and the values as text."""
    for key in dict.fromkeys((*a, *b)):
        if a.get(key) != b.get(key):
            yield prefix + key, _plain(a.get(key)), _plain(b.get(key))


def _plain(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return "" if value is None else str(value)


def lacking(a: Records, b: Records) -> Iterator[str]:
    """Yield what A has and B lacks: runs, and figures of other runs."""
    for name in a:
        if name not in b:
            yield name
            continue
        rows: dict[str, list[str]] = {}
        for row, column in a[name].figures:
            if (row, column) not in b[name].figures:
                rows.setdefault(row, []).append(column)
        yield from (f"{name}: {row}: {', '.join(columns)}" for row, columns in rows.items())


def _print(compared: Compared) -> None:
    console = Console(width=None if is_terminal() else 200)
    if compared.differing:
        table = Table("differs", *(f"{side}: {escape(printable(name))}" for side, name in compared.sides.items()))
        for line in compared.differing:
            table.add_row(*(Text(printable(text)) for text in line))
        console.print(table)
    table = Table()
    for head in _HEADS:
        table.add_column(head, justify="right" if head in ("A", "B", "B/A") else "left")
    for each in compared.figures:
        *cells, verdict = each.cells()
        table.add_row(*(Text(printable(cell)) for cell in cells), Text(verdict, style=VERDICTS[verdict][0]))
    console.print(table)
    for side, text in compared.lacking:
        console.print(Text(printable(f"only in {side}: {text}", 1000)))
    console.print(Text(compared.totals))


def _write(output: Path, compared: Compared) -> None:
    """Write the page to the file `output`, or to ``index.html`` in the folder `output`."""
    content: list[Content] = [element("p", f"{side}: {name}") for side, name in compared.sides.items()]
    content.append(element("p", f"{compared.totals}."))
    if compared.differing:
        content += [element("h2", "What differs"), html.table(("", "A", "B"), compared.differing)]
    rows: list[list[Content]] = []
    for each in compared.figures:
        *cells, verdict = each.cells()
        rows.append([*cells, element("span", verdict, class_=VERDICTS[verdict][1])])
    content += [element("h2", "Figures"), html.table(_HEADS, rows, class_="figures sides")]
    if compared.lacking:
        content += [element("h2", "In one of them only"), html.table(("", ""), compared.lacking)]
    path = output if output.suffix == ".html" else output / "index.html"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(path, [html.page("hpcavg benchmarks compared", content)])
    except OSError as error:
        raise InputError("output", output, f"a file or folder that can be written ({why(error)})") from error


if __name__ == "__main__":
    run(main)
