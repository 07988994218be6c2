"""Time to a loss against the number of machines, at rates in proportion to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.lupa_sgd import epsilon, figure_3
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, less
from hpcavg.experiments.verdict import all_of

_ALONE = ", at the rate of "


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with growing numbers of machines, which see as many samples, and one machine at each of the rates."""
    steps, rate = scale.pick((5600, 0.125), (200, 4.0))
    numbers = scale.pick((1, 2, 4, 8), (1, 2))

    def run(machines: int, of: int) -> Callable[[int], Run]:
        return epsilon.run(scale, machines, steps // of, rate * of, algorithm="lupa", tau=figure_3.TAU)

    together = {f"p = {number}": run(number, number) for number in numbers}
    return together | {f"p = 1{_ALONE}p = {number}": run(1, number) for number in numbers[1:]}


def judge(results: Results) -> Finding:
    """Fit the slope of the time over the number of machines, and compare each number with one machine."""
    times = figure_3.times_to_level(results)
    together = {arm: of_arm for arm, of_arm in times.items() if _ALONE not in arm}
    falls, plot = figure_3.falls_linearly(together)
    _, *several = together
    beats = [
        less(f"time of {arm}: less than that of one machine at the rate", times[arm], times[_alone(arm)], SHARE_PERCENT)
        for arm in several
    ]
    return Finding(all_of(falls, *beats), figure_3.HEADS, table_of(times, 0), [plot])


def _alone(arm: str) -> str:
    return f"p = 1{_ALONE}{arm}"


def _pretend(holds: bool) -> Results:
    """Return results in which one machine is as slow at every rate, or almost as fast as several."""
    together = figure_3.losses(-0.9)
    slower = 1 + (2 if holds else 0.5) * SHARE_PERCENT / 100
    alone = {_alone(arm): np.array(losses) ** (1 / slower) for arm, losses in together.items() if arm != "p = 1"}
    return epsilon.made_up(together | alone)


EXPERIMENT = Experiment(
    name="lupa-sgd-figure-3-scaled-rate",
    paper="lupa-sgd",
    where="Section 6, Figure 3",
    claim="The time until a loss of 0.35 falls linearly with the number of machines, with tau = 91 and rates in"
    " proportion to that number; and it is the machines that make it fall.",
    saw="As for lupa-sgd-figure-3. The paper does not speak of such rates; this is the other way to read its speed-up.",
    rule="It holds if the slope of log time against log p is below -0.8 (linear is -1), and if p machines take over"
    f" {SHARE_PERCENT:.0f} % less time than one machine at the same rate, for each p: else the rate does it. It fails"
    " if one of these is not so. A mean takes as long as 5 steps, that of one machine, too.",
    scaling=f"{epsilon.SCALING}; the rate is p / 8. 1 to 8 machines; the text does not list the paper's.",
    arms=arms,
    judge=judge,
    pretend=_pretend,
    recipes=("lupa-sgd/figure2-lupa",),
)
