"""A plot for each benchmark of a suite, as SVG for light and for dark pages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.figures import FLOOR, WIRE, Figure, Figures, OverBest, scale
from benchmarks.results import OVER_BEST, Record

matplotlib.use("Agg")
from matplotlib import pyplot as plt

STYLES = {"light": "default", "dark": "dark_background"}
_MARKERS = "osv^D<>pXP*h"
# Lines in the plot of auto over the best: equal, and what may be lost.
_REFERENCES = {1.0: "-", 1.1: "--"}
# The columns of a benchmark that are drawn as bars, a panel for each.
_BARS = {
    "overlap": ["overlap", "computation slower"],
    "training": ["rate", "to target"],
    "memory": ["steps"],
    "own_pace": ["fast ranks wait", "all ranks"],
    "step_overhead": ["overhead"],
    "data_pipeline": ["feed", "floor", "one by one"],
    "compare_algorithms": ["accuracy", "training"],
}


def draw(record: Record, name: str, folder: Path) -> None:
    """Write ``name-light.svg`` and ``name-dark.svg`` to `folder`, unless the record has no figures."""
    if not record.figures:
        return
    plot: Callable[[Figures], Any] = {"mean": _mean, "scaling": _scaling}.get(
        record.benchmark, lambda figures: _bars(figures, _BARS[record.benchmark])
    )
    _save(lambda: plot(record.figures), name, folder)


def draw_over_best(runs: Mapping[str, Mapping[str, OverBest]], folder: Path) -> None:
    """Write the plots `OVER_BEST` of auto over the best, by run and column, to `folder`, unless there are none."""
    if runs:
        _save(lambda: _over_best(runs), OVER_BEST, folder)


def _save(plot: Callable[[], Any], name: str, folder: Path) -> None:
    for theme, style in STYLES.items():
        with plt.style.context(["default", style, {"axes.spines.top": False, "axes.spines.right": False}]):
            figure = plot()
            for axes in figure.axes:
                axes.grid(alpha=0.25)
                axes.set_axisbelow(True)
            figure.savefig(folder / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})
            plt.close(figure)


def _mean(figures: Figures) -> Any:
    """Draw the time of a mean against its size, a line for each engine."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for index, name in enumerate(dict.fromkeys(row for row, _ in figures)):
        of_size = {_bytes(column): found for (row, column), found in figures.items() if row == name}
        style = {"ls": "--", "color": "gray"} if name in (FLOOR, WIRE) else {}
        _line(axes, of_size, 1e3, name, index, **style)
    axes.set(xscale="log", yscale="log", xlabel="bytes of the parameters", ylabel="ms, median and 95 % interval")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _over_best(runs: Mapping[str, Mapping[str, OverBest]]) -> Any:
    """Draw the time of auto over that of the best against the size, a line for each run."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    for ratio, style in _REFERENCES.items():
        axes.axhline(ratio, color="gray", ls=style, lw=1, label=f"{ratio:.2f}")
    for index, (name, found) in enumerate(runs.items()):
        of_size = {_bytes(size): Figure((each.ratio,), "", "less") for size, each in found.items()}
        _line(axes, of_size, 1.0, name, index)
    axes.set(xscale="log", xlabel="bytes of the parameters", ylabel="median of auto / median of the best")
    figure.legend(loc="outside right center", frameon=False, fontsize="small")
    return figure


def _bytes(column: str) -> int:
    return int(column.split()[0].replace(",", ""))


def _scaling(figures: Figures) -> Any:
    """Draw samples per second against ranks: weak scaling on the left, strong scaling on the right."""
    figure, panels = plt.subplots(1, 2, figsize=(8.5, 4), layout="constrained", sharey=True)
    parts = {(*row.split(", "),): found for (row, column), found in figures.items() if column == "rate"}
    for axes, kind in zip(panels, ("weak", "strong"), strict=True):
        for index, name in enumerate(dict.fromkeys(name for _, name, _ in parts)):
            own = {ranks: found for (k, n, ranks), found in parts.items() if (k, n) == (kind, name)}
            _line(axes, {int(ranks.split()[0]): found for ranks, found in own.items()}, 1.0, name, index)
        counts = sorted({int(ranks.split()[0]) for _, _, ranks in parts})
        axes.set(title=f"{kind} scaling", xlabel="ranks", xscale="log", xticks=counts, xticklabels=counts)
        axes.minorticks_off()
    panels[0].set(ylabel="samples/s, median and 95 % interval", ylim=(0, None))
    panels[0].legend(frameon=False)
    return figure


def _line(axes: Any, by_position: dict[int, Figure], factor: float, label: str, index: int, **style: Any) -> None:
    positions = sorted(by_position)
    medians = [by_position[position].median * factor for position in positions]
    errors = [_errors(by_position[position], factor) for position in positions]
    marker = _MARKERS[index % len(_MARKERS)]
    axes.errorbar(
        positions, medians, list(zip(*errors, strict=True)), label=label, marker=marker, ms=5, capsize=2, **style
    )


def _bars(figures: Figures, columns: list[str]) -> Any:
    """Draw a panel of horizontal bars for each of the `columns` that has figures."""
    found = [column for column in columns if any(key[1] == column for key in figures)]
    rows = list(dict.fromkeys(row for row, column in figures if column in found))
    size = (8.5, 1.1 + 0.3 * len(rows))
    figure, panels = plt.subplots(1, len(found), figsize=size, layout="constrained", sharey=True, squeeze=False)
    for axes, column in zip(panels[0], found, strict=True):
        drawn = {row: figures[row, column] for row in rows if (row, column) in figures}
        factor, unit = scale(list(drawn.values()))
        drawn = {row: figure for row, figure in drawn.items() if max(figure.bounds) < float("inf")}
        errors = [_errors(figure, factor) for figure in drawn.values()]
        places = [rows.index(row) for row in drawn]
        axes.barh(places, [figure.median * factor for figure in drawn.values()], height=0.6)
        if drawn:
            sides = list(zip(*errors, strict=True))
            line = plt.rcParams["axes.edgecolor"]
            axes.errorbar(
                [f.median * factor for f in drawn.values()], places, xerr=sides, ls="", color=line, capsize=3, lw=1
            )
        axes.set(xlabel=f"{column}, {unit}" if unit else column, yticks=range(len(rows)), yticklabels=rows)
    panels[0][0].invert_yaxis()
    return figure


def _errors(figure: Figure, factor: float) -> tuple[float, float]:
    """Return the distances from the median down and up to the ends of its interval; NaN for one value."""
    if len(figure.values) == 1:
        return math.nan, math.nan
    low, high = figure.bounds
    return (figure.median - low) * factor, (high - figure.median) * factor
