"""The HTML page of a suite: its runs, their environment and outcomes, and every figure with unit and interval."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from xml.etree.ElementTree import Element

from benchmarks.figures import AUTO, FEWEST, Figures, OverBest, number, scale, texts
from benchmarks.html import Content, element, page, table
from benchmarks.results import ENVIRONMENT, OVER_BEST, Outcome, Record, Suite, over_best
from hpcavg.utils import files

PAGE = "index.html"
_TAIL_LINES = 40
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def write(folder: Path, suite: Suite, records: Mapping[str, Record]) -> None:
    """Write the page to `folder`, beside the files of the runs. Raises `OSError`."""
    title = f"hpcavg benchmarks, {suite.preset}"
    content = [*_summary(suite), *_environment(suite, records), *_over_best(over_best(records))]
    for outcome in suite.outcomes:
        content += _section(folder, outcome, records.get(outcome.name))
    files.replace_file(folder / PAGE, [page(title, content)])


def _summary(suite: Suite) -> Iterator[Element]:
    counts = [sum(outcome.state == state for outcome in suite.outcomes) for state in ("done", "failed", "not run")]
    wall_s = sum(outcome.wall_s for outcome in suite.outcomes)
    told = f"{counts[0]} done, {counts[1]} failed, {counts[2]} not run, in {wall_s:.0f} s; started {suite.date}"
    yield element("p", told, class_="soft")
    rows = (
        (
            element("a", outcome.name, href=f"#{outcome.name}"),
            element("span", outcome.state, class_={"done": "good", "failed": "bad"}.get(outcome.state, "soft")),
            f"{outcome.wall_s:.1f}" if outcome.wall_s else "",
            outcome.reason,
        )
        for outcome in suite.outcomes
    )
    yield table(("benchmark", "", "wall time, s", ""), rows)
    yield element(
        "p",
        "Figures are medians. Below each is the 95 % interval of the median, or the whole range of fewer than ",
        f"{FEWEST} values. The JSON files hold every value.",
    )


def _environment(suite: Suite, records: Mapping[str, Record]) -> Iterator[Element]:
    yield element("h2", "Environment")
    rows: list[tuple[str, Content]] = [
        ("command", shlex.join(suite.command)),
        ("in the folder", suite.started_in),
        ("load before it, 1, 5 and 15 minutes", ", ".join(f"{load:.2f}" for load in suite.load)),
    ]
    for key, name in ENVIRONMENT.items():
        values = (record.environment.get(key, "") for record in records.values())
        told = (", ".join(map(str, value)) if isinstance(value, list) else str(value) for value in values)
        rows.append((name, "; ".join(dict.fromkeys(told))))  # runs on emulated nodes differ
    rows += suite.variables.items()
    yield table(("", ""), ((name, element("td", value, class_="long")) for name, value in rows if value != ""))


def _over_best(runs: Mapping[str, Mapping[str, OverBest]]) -> Iterator[Element]:
    """Yield the plot and the table of auto over the best, by run and column."""
    if not runs:
        return
    yield element("h2", "auto over best", id=OVER_BEST)
    yield element("p", f"The median of {AUTO} over that of the fastest other that averages, named below the figure.")
    yield _picture(OVER_BEST)
    sizes = list(dict.fromkeys(size for found in runs.values() for size in found))
    rows = [[name, *(_ratio(found.get(size)) for size in sizes)] for name, found in runs.items()]
    yield table(("", *sizes), rows, class_="figures")


def _ratio(found: OverBest | None) -> Content:
    return "" if found is None else element("td", number(found.ratio), element("small", found.best))


def _section(folder: Path, outcome: Outcome, record: Record | None) -> Iterator[Element]:
    yield element("h2", outcome.name, id=outcome.name)
    about = _about(outcome)
    if about:
        yield element("p", about)
    words = [element("span", shlex.quote(word)) for word in outcome.command]  # lines break only between words
    yield element("pre", *(part for word in words for part in (word, " ")), class_="command")
    output = folder / f"{outcome.name}.txt"
    if outcome.state == "failed":
        yield element("p", f"Failed: {outcome.reason}. Its output ends with:", class_="bad")
        yield element("pre", "\n".join(_lines(output)[-_TAIL_LINES:]))
    elif outcome.state == "not run":
        yield element("p", f"Not run: {outcome.reason}.", class_="soft")
    if record is not None and record.figures:
        if (folder / f"{outcome.name}-light.svg").exists():
            yield _picture(outcome.name)
        yield figures_table(record.figures)
        yield element("p", element("a", f"{outcome.name}.json", href=f"{outcome.name}.json"))
    if outcome.state == "done":
        yield element("details", element("summary", "its own output"), element("pre", "\n".join(_lines(output))))


def figures_table(figures: Figures) -> Element:
    """Return the figures as a table with units in its heads."""
    columns = list(dict.fromkeys(column for _, column in figures))
    scales = {name: scale([found for (_, column), found in figures.items() if column == name]) for name in columns}
    heads = [f"{name}, {unit}" if unit else name for name, (_, unit) in scales.items()]
    rows: list[list[Content]] = []
    for row in dict.fromkeys(row for row, _ in figures):
        cells: list[Content] = [row]
        for column in columns:
            figure = figures.get((row, column))
            median, spread = ("", "") if figure is None else texts(figure, scales[column][0])
            cells.append(element("td", median, element("small", spread)) if spread else median)
        rows.append(cells)
    return table(("", *heads), rows, class_="figures")


def _picture(name: str) -> Element:
    source = element("source", srcset=f"{name}-dark.svg", media="(prefers-color-scheme: dark)")
    image = element("img", src=f"{name}-light.svg", alt=f"plot of {name}; the table below has its figures")
    return element("picture", source, image)


def _about(outcome: Outcome) -> str:
    """Return the first line of the docstring of the benchmark's module, without importing it, which takes seconds."""
    *_, module = ("", *(word.partition(".")[2] for word in outcome.command if word.startswith("benchmarks.")))
    path = Path(__file__).with_name(f"{module}.py")  # the last one: `cluster` may start it
    text = ast.get_docstring(ast.parse(path.read_text())) if path.is_file() else None
    return (text or "").partition("\n")[0].replace("``", "")


def _lines(path: Path) -> list[str]:
    """Return the lines of a program's output without colours; none if there is no file."""
    if not path.is_file():
        return []
    text = _ESCAPES.sub("", path.read_text(errors="replace")).replace("\0", "").replace("\r", "\n")
    return [line.replace("\t", "    ") for line in text.strip("\n").split("\n")]
