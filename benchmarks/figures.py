"""The figures in a benchmark's JSON record, by row and column of its table. Imports neither torch nor MPI."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

FEWEST = 6
"""With fewer values than this, their median has no 95 % interval."""

AUTO, FLOOR, WIRE = "hpcavg auto", "copy once", "the wire alone"
"""Rows of `mean`: the engine that is chosen, and two that average nothing."""


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its confidence interval of at least 95 %, or the whole range of fewer than 6 values.

    The j-th smallest and the j-th largest of n values enclose the median except with probability
    2 P(Binomial(n, 1/2) < j). j is the largest number for which this is at most 5 %.

    Returns
    -------
    median : float
    low : float
        The lower end of the interval.
    high : float
        The upper end of the interval.
    """
    ordered = sorted(values)
    n, cut, outside = len(ordered), 0, 0
    while (outside := outside + math.comb(n, cut)) * 40 <= 2**n:
        cut += 1
    cut = max(cut, 1)
    return statistics.median(ordered), ordered[cut - 1], ordered[n - cut]


@dataclass(frozen=True)
class Figure:
    """Something that was measured.

    Attributes
    ----------
    values : every value, at least one. An infinite one means: never reached.
    unit : such as ``"s"``, ``"%"`` or ``"samples/s"``.
    better : whether less or more is better.
    """

    values: tuple[float, ...]
    unit: str
    better: Literal["less", "more"]

    @property
    def median(self) -> float:
        """The median of the values."""
        return interval(self.values)[0]

    @property
    def bounds(self) -> tuple[float, float]:
        """The median's 95 % interval, or the whole range of fewer than 6 values."""
        return interval(self.values)[1:]

    @property
    def has_interval(self) -> bool:
        """Whether there are enough values for an interval."""
        return len(self.values) >= FEWEST

    def overlaps(self, other: Figure) -> bool | None:
        """Return whether the intervals of two figures overlap; None if one of them has too few values."""
        if not (self.has_interval and other.has_interval):
            return None
        (low, high), (other_low, other_high) = self.bounds, other.bounds
        return low <= other_high and other_low <= high


Figures = dict[tuple[str, str], Figure]
"""By row and column."""


def figures(record: Mapping[str, Any]) -> Figures:
    """Return the figures of a record as a benchmark wrote it. Raises `KeyError`, `TypeError` etc. for anything else."""
    return {
        key: figure
        for key, figure in _READERS[record["benchmark"]](record["results"]).items()
        if figure.values and not any(map(math.isnan, figure.values))
    }


class OverBest(NamedTuple):
    """`hpcavg auto` against the fastest of all else that averages.

    Attributes
    ----------
    auto_s : the median of auto, in seconds.
    best : the name of the fastest.
    best_s : its median, in seconds.
    ratio : `auto_s` over `best_s`.
    extra_s : `auto_s` less `best_s`.
    overlap : whether their 95 % intervals overlap; None if there are too few values.
    """

    auto_s: float
    best: str
    best_s: float
    ratio: float
    extra_s: float
    overlap: bool | None


def auto_over_best(found: Mapping[str, Figure]) -> OverBest | None:
    """Return auto against the best of one size, from all figures of `mean` by name; None if one of both is absent."""
    others = {name: figure for name, figure in found.items() if name not in (AUTO, FLOOR, WIRE)}
    if AUTO not in found or not others:
        return None
    auto = found[AUTO]
    best = min(others, key=lambda name: others[name].median)
    auto_s, best_s = auto.median, others[best].median
    return OverBest(auto_s, best, best_s, auto_s / best_s, auto_s - best_s, auto.overlaps(others[best]))


def over_best_by_size(figures: Figures) -> dict[str, OverBest]:
    """Return auto against the best by column, from the figures of `mean`; without the sizes that lack one of both."""
    of_sizes: dict[str, dict[str, Figure]] = {}
    for (name, size), figure in figures.items():
        of_sizes.setdefault(size, {})[name] = figure
    compared = {size: auto_over_best(found) for size, found in of_sizes.items()}
    return {size: found for size, found in compared.items() if found is not None}


# -- one reader for each benchmark ------------------------------------------------------------------------------------


def _mean(results: Any) -> Figures:
    found = {
        (name, f"{int(size):,} bytes"): Figure(tuple(values), "s", "less")
        for size, seconds in results["seconds"].items()
        for name, values in seconds.items()
    }
    for size, seconds in results.get("wire_s", {}).items():
        found[WIRE, f"{int(size):,} bytes"] = Figure((seconds,), "s", "less")
    return found


def _overlap(results: Any) -> Figures:
    # The computation's own time is no figure: it is chosen to suit the mean.
    columns: dict[str, tuple[str, str, Literal["less", "more"]]] = {
        "pure_s": ("mean alone", "s", "less"),
        "overlap_percent": ("overlap", "%", "more"),
        "slower_percent": ("computation slower", "%", "less"),
    }
    return {
        (name, column): Figure(tuple(found[key]), unit, better)
        for name, found in results.items()
        for key, (column, unit, better) in columns.items()
    }


def _training(results: Any) -> Figures:
    found = {}
    silent = [turn["samples_per_s"] for turn in results["sgd"]]
    for name, turns in results.items():
        rates = [turn["samples_per_s"] for turn in turns]
        shares = [100 * rate / sgd for rate, sgd in zip(rates, silent, strict=True)]
        found[name, "rate"] = Figure(tuple(rates), "samples/s", "more")
        if name != "sgd":
            found[name, "of sgd"] = Figure(tuple(shares), "%", "more")
        if name not in ("single", "sgd", "ddp"):
            found[name, "blocked"] = Figure(tuple(100 * turn["blocked"] for turn in turns), "%", "less")
            hidden = tuple(100 * turn["hidden"] for turn in turns if turn["hidden"] is not None)
            found[name, "hidden"] = Figure(hidden, "%", "more")
        if "seconds_to_target" in turns[0]:
            times = (turn["seconds_to_target"] for turn in turns)
            found[name, "to target"] = Figure(tuple(math.inf if s is None else s for s in times), "s", "less")
    return found


def _scaling(results: Any) -> Figures:
    found = {}
    for kind, by_name in results["samples_per_s"].items():
        for name, by_count in by_name.items():
            for count, rates in by_count.items():
                row = f"{kind}, {name}, {count} rank{'s' * (count != '1')}"
                found[row, "rate"] = Figure(tuple(rates), "samples/s", "more")
                if count != "1":
                    pairs = zip(rates, by_count["1"], strict=True)
                    shares = tuple(100 * rate / (int(count) * first) for rate, first in pairs)
                    found[row, "efficiency"] = Figure(shares, "%", "more")
    return found


def _memory(results: Any) -> Figures:
    return {
        (name, part): Figure((copies,), "copies", "less")
        for name, parts in results["copies"].items()
        for part, copies in parts.items()
    }


def _own_pace(results: Any) -> Figures:
    found = {}
    for name, measured in results.items():
        row = name.partition("(")[0]  # the period of K-AVG differs from run to run
        slow, *fast = measured["waited"]
        found[row, "fast ranks wait"] = Figure((100 * max(fast),), "%", "less")
        found[row, "slow rank waits"] = Figure((100 * slow,), "%", "less")
        found[row, "all ranks"] = Figure((sum(measured["steps_per_s"]),), "steps/s", "more")
    return found


def _step_overhead(results: Any) -> Figures:
    found = {}
    for name, measured in results.items():
        plain, ours = ([us / 1e6 for us in measured[f"{what}_step_us"]] for what in ("optimizer", "averager"))
        found[name, "optimizer.step"] = Figure(tuple(plain), "s", "less")
        found[name, "averager.step"] = Figure(tuple(ours), "s", "less")
        overheads = tuple(b - a for a, b in zip(plain, ours, strict=True))
        found[name, "overhead"] = Figure(overheads, "s", "less")
    return found


def _data_pipeline(results: Any) -> Figures:
    found = {}
    for size, of_ways in results["images_per_s"].items():
        for name, rates in of_ways.items():
            found[f"batches of {size}", name] = Figure(tuple(rates), "images/s", "more")
    found["training images", "copies held"] = Figure((results["copies_held"],), "copies", "less")
    return found


def _compare_algorithms(results: Any) -> Figures:
    found: dict[tuple[str, str], tuple[Any, str, Literal["less", "more"]]] = {}
    for name, run in results.items():
        found[name, "accuracy"] = (run["test_accuracy"], "", "more")
        found[name, "test loss"] = (run["test_loss"], "", "less")
        found[name, "training"] = (run["wall_s"], "s", "less")
        found[name, "blocked"] = (100 * run["averaging_blocked_s"] / run["wall_s"], "%", "less")
    return {
        key: Figure((math.nan if value is None else value,), unit, better)
        for key, (value, unit, better) in found.items()
    }


_READERS: dict[str, Callable[[Any], Figures]] = {
    "mean": _mean,
    "overlap": _overlap,
    "training": _training,
    "scaling": _scaling,
    "memory": _memory,
    "own_pace": _own_pace,
    "step_overhead": _step_overhead,
    "data_pipeline": _data_pipeline,
    "compare_algorithms": _compare_algorithms,
}


# -- for people -------------------------------------------------------------------------------------------------------


def scale(figures: Sequence[Figure]) -> tuple[float, str]:
    """Return a factor for figures of one unit and the new unit: short times become ms or µs."""
    unit = figures[0].unit
    if unit != "s":
        return 1.0, unit
    shortest = min((abs(figure.median) for figure in figures if figure.median), default=1.0)
    return next((found for found in ((1.0, "s"), (1e3, "ms")) if shortest * found[0] >= 1), (1e6, "µs"))


def number(value: float) -> str:
    """Return `value` with three significant digits."""
    if math.isinf(value):
        return "not reached"
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{min(max(digits, 0), 4)}f}"


def texts(figure: Figure, factor: float = 1.0) -> tuple[str, str]:
    """Return median and interval times `factor`, for a table. The interval of one value is empty."""
    low, high = figure.bounds
    spread = f"{number(low * factor)} to {number(high * factor)}" if len(figure.values) > 1 else ""
    return number(figure.median * factor), spread
