"""What runs say to a claim: it holds, it does not hold, or these runs cannot tell. All from paired differences.

A claim is made of comparisons: that a quantity exceeds a margin, on average over the seeds. A comparison holds if the
whole confidence interval of the mean is above the margin, and fails if the whole interval is below. The statistics are
SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
_POWER = 0.8
_MOST_SEEDS = 1000


class Verdict(Enum):
    """What runs say to a claim."""

    HOLDS = "holds"
    FAILS = "does not hold"
    UNDECIDED = "undecided here"


@dataclass(frozen=True)
class Judgement:
    """A verdict and what it rests on.

    Attributes
    ----------
    verdict : the verdict.
    statistics : a sentence for each comparison. If there are several, it also has the interval at which one of them
        decides alone: that of 95 % for all of them together.
    seeds_to_decide : how many seeds would probably have decided it, if the differences stay what they are; None if it
        is decided, or if 1000 would not.
    """

    verdict: Verdict
    statistics: tuple[str, ...]
    seeds_to_decide: int | None = None


@dataclass(frozen=True)
class Comparison:
    """That the mean of `values` is above `margin`.

    Parameters
    ----------
    what : names the values, such as "accuracy of K = 8 less that of K = 1".
    values : one for each seed.
    margin : what their mean must exceed.
    unit : follows the numbers, such as " %".

    Examples
    --------
    >>> from hpcavg.experiments.verdict import Comparison, all_of
    >>> judgement = all_of(Comparison("gain", [0.9, 1.0, 1.1]))
    >>> judgement.verdict.value, judgement.statistics
    ('holds', ('gain: 1 (0.752 to 1.25), effect size 10, n = 3; must be above 0',))
    """

    what: str
    values: Sequence[float]
    margin: float = 0.0
    unit: str = ""

    @cached_property
    def mean(self) -> float:
        """The mean over the seeds."""
        return float(np.mean(self.values))

    @cached_property
    def _deviation(self) -> float:
        is_known = len(self.values) > 1 and math.isfinite(self.mean)
        return float(np.std(self.values, ddof=1)) if is_known else math.nan

    def interval(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Return Student's confidence interval of the mean. That of one seed has no ends."""
        if not math.isfinite(self.mean):
            return -math.inf, math.inf
        low, high = intervals(self.values, confidence)
        return float(low[0]), float(high[0])

    def holds(self, confidence: float = CONFIDENCE) -> bool:
        """Return whether the interval is above the margin."""
        return self.interval(confidence)[0] > self.margin

    def fails(self, confidence: float = CONFIDENCE) -> bool:
        """Return whether the interval is below the margin, or ends there."""
        return self.interval(confidence)[1] <= self.margin

    def seeds_to_decide(self, confidence: float = CONFIDENCE) -> int | None:
        """Return the number of seeds at which four of five experiments would decide; None if 1000 do not suffice.

        The mean and the deviation are taken for the true ones.

        Parameters
        ----------
        confidence : of the interval that must not hold the margin.
        """
        from scipy import stats

        distance = abs(self.mean - self.margin)
        if not distance > 0 or not math.isfinite(distance) or not math.isfinite(self._deviation):
            return None
        if self._deviation == 0:
            return 2
        seeds = np.arange(2, _MOST_SEEDS + 1)
        critical = stats.t.ppf(0.5 + confidence / 2, seeds - 1)
        power = stats.nct.sf(critical, seeds - 1, distance / self._deviation * np.sqrt(seeds))
        return int(seeds[np.argmax(power >= _POWER)]) if (power >= _POWER).any() else None

    def sentence(self, corrected: float = CONFIDENCE) -> str:
        """Return what the values say.

        Parameters
        ----------
        corrected : the confidence at which it decides a claim of several comparisons alone.
        """
        ends = [f"{low:.3g} to {high:.3g}" for low, high in map(self.interval, (CONFIDENCE, corrected))]
        together = f"; with all together {ends[1]}" if corrected > CONFIDENCE else ""
        distance = abs(self.mean - self.margin)
        effect = distance / self._deviation if self._deviation else math.inf
        return (
            f"{self.what}: {self.mean:.3g}{self.unit} ({ends[0]}{together}), effect size {effect:.2g},"
            f" n = {len(self.values)}; must be above {self.margin:.3g}"
        )


def exceeds(what: str, larger: ArrayLike, smaller: ArrayLike, margin: float = 0.0, unit: str = "") -> Comparison:
    """Return the comparison that `larger` exceeds `smaller` by more than `margin`, seed by seed.

    Parameters
    ----------
    what : names the difference.
    larger : a value for each seed.
    smaller : a value for each seed, in the same order.
    margin : negative for "is not worse by more than".
    unit : see `Comparison`.
    """
    with np.errstate(invalid="ignore"):  # of two runs that diverged
        differences = np.asarray(larger, float) - np.asarray(smaller, float)
    return Comparison(what, differences.tolist(), margin, unit)


def all_of(*comparisons: Comparison) -> Judgement:
    """Return the judgement of a claim that needs all comparisons.

    It holds if all hold, each with a confidence of 95 %. It fails if one fails; the chance that any of n fails
    wrongly stays at 5 %, by Bonferroni's correction.
    """
    corrected = _corrected(comparisons)
    if any(comparison.fails(corrected) for comparison in comparisons):
        verdict = Verdict.FAILS
    elif all(comparison.holds() for comparison in comparisons):
        verdict = Verdict.HOLDS
    else:
        verdict = Verdict.UNDECIDED
    open_ones = [each for each in comparisons if not each.holds()]
    return _judged(verdict, open_ones, [each for each in open_ones if each.mean < each.margin], comparisons)


def any_of(*comparisons: Comparison) -> Judgement:
    """Return the judgement of a claim that needs one of the comparisons. It is `all_of` the other way round."""
    corrected = _corrected(comparisons)
    if any(comparison.holds(corrected) for comparison in comparisons):
        verdict = Verdict.HOLDS
    elif all(comparison.fails() for comparison in comparisons):
        verdict = Verdict.FAILS
    else:
        verdict = Verdict.UNDECIDED
    open_ones = [each for each in comparisons if not each.fails()]
    return _judged(verdict, open_ones, [each for each in open_ones if each.mean > each.margin], comparisons)


def within(what: str, one: ArrayLike, other: ArrayLike, margin: float, unit: str = "") -> tuple[Comparison, Comparison]:
    """Return the two comparisons that `one` and `other` differ by less than `margin`, for `all_of`.

    This is the test of equivalence by two one-sided tests (Schuirmann 1987).
    """
    return (
        exceeds(f"{what} is not lower", one, other, -margin, unit),
        exceeds(f"{what} is not higher", other, one, -margin, unit),
    )


def _corrected(comparisons: Sequence[Comparison]) -> float:
    """Return the confidence of each comparison with which that of all together is `CONFIDENCE`."""
    return 1 - (1 - CONFIDENCE) / len(comparisons)


def _judged(
    verdict: Verdict, open_ones: Sequence[Comparison], alone: Sequence[Comparison], comparisons: Sequence[Comparison]
) -> Judgement:
    """Return the judgement. Each of `alone` may decide alone, else the last of `open_ones` decides."""
    corrected = _corrected(comparisons)
    needed: int | None = None
    if verdict is Verdict.UNDECIDED and alone:
        needed = min((seeds for each in alone if (seeds := each.seeds_to_decide(corrected))), default=None)
    elif verdict is Verdict.UNDECIDED:
        seeds_of = [each.seeds_to_decide() for each in open_ones]
        needed = None if None in seeds_of else max(seeds for seeds in seeds_of if seeds is not None)
    return Judgement(verdict, tuple(each.sentence(corrected) for each in comparisons), needed)


def intervals(values: ArrayLike, confidence: float = CONFIDENCE) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the lower and upper ends of Student's confidence intervals of the means over the seeds.

    Parameters
    ----------
    values : shape (seeds, ...). Seeds with NaN do not count.
    confidence : of each interval.

    Returns
    -------
    low, high : arrays of shape (...)
        Infinite where fewer than two seeds count.
    """
    from scipy import stats

    found = np.ma.masked_invalid(np.asarray(values, float))
    seeds = np.atleast_1d(found.count(axis=0))
    mean, deviation = (np.atleast_1d(np.ma.filled(part, np.nan)) for part in (found.mean(0), found.std(0, ddof=1)))
    half = np.full(mean.shape, math.inf)
    known = seeds > 1
    quantile = stats.t.ppf(0.5 + confidence / 2, seeds[known] - 1)
    half[known] = quantile * deviation[known] / np.sqrt(seeds[known])
    mean = np.where(known, mean, 0.0)
    return mean - half, mean + half


def given(control: Comparison, judgement: Judgement) -> Judgement:
    """Return a judgement of runs that must show, by a control, that they can tell.

    The claim says that something costs nothing. The control is that something cruder does cost. Without it these runs
    would let everything pass, and "holds" becomes undecided. A claim that fails needs no control.

    Parameters
    ----------
    control : that the cruder setting costs.
    judgement : that of the claim.
    """
    statistics = (*judgement.statistics, f"control: {control}")
    if judgement.verdict is Verdict.HOLDS and not control.holds():
        needed = control.seeds_to_decide() if control.mean > control.margin else None
        return Judgement(Verdict.UNDECIDED, statistics, needed)
    return replace(judgement, statistics=statistics)
