"""Time to a loss against the number of machines, at one rate for all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.lupa_sgd import epsilon
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import log_slopes, number_in, times_to
from hpcavg.experiments.verdict import Comparison, all_of, exceeds

TAU = 91
LEVEL = 0.35
# Linear speed-up is a slope of -1.
_SLOPE = -0.8
HEADS = ("arm", f"simulated time to a test loss of {LEVEL}")


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with growing numbers of machines."""
    steps = scale.pick(700, 100)
    return {
        f"p = {machines}": epsilon.run(scale, machines, steps, scale.pick(1.0, 8.0), algorithm="lupa", tau=TAU)
        for machines in scale.pick((1, 2, 4, 8), (1, 2))
    }


def times_to_level(results: Results) -> dict[str, NDArray[Any]]:
    """Return the simulated times to the level: by arm, one for each seed."""
    return {
        arm: times_to(
            np.full(len(results[arm]), LEVEL),
            epsilon.times(results, arm, TAU),
            results.values_of(arm, "evaluations", "test_loss"),
        )
        for arm in results
    }


def falls_linearly(times: Mapping[str, NDArray[Any]]) -> tuple[Comparison, Plot]:
    """Return that the slope of the times over the number of machines is about -1, and their plot."""
    machines, of_all = [number_in(arm, "p") for arm in times], np.stack([*times.values()], axis=1)
    slopes = log_slopes(machines, of_all)
    plot = Plot("time", "machines", "simulated time, in steps", [Line("LUPA-SGD", machines, of_all)], True, True)
    return exceeds("negative slope of log time against log p", -slopes, 0, -_SLOPE), plot


def judge(results: Results) -> Finding:
    """Fit the slope of the time to the level over the number of machines."""
    times = times_to_level(results)
    falls, plot = falls_linearly(times)
    return Finding(all_of(falls), HEADS, table_of(times, 0), [plot])


def losses(power: float) -> dict[str, NDArray[Any]]:
    """Return made-up losses, with times in proportion to a power of the number of machines."""
    return {f"p = {p}": np.exp(-0.05 * np.arange(1, 41) / p**power) for p in (1, 2, 4)}


EXPERIMENT = Experiment(
    name="lupa-sgd-figure-3",
    paper="lupa-sgd",
    where="Section 6, Figure 3",
    claim="The time until a loss of 0.35 falls linearly with the number of machines, with tau = 91.",
    saw='Figure 3: the time to an error of 0.35, mean of 5 repeats, "indicates that LUPA-SGD with tau = 91 can benefit'
    ' from linear speedup by increasing the number of machines". The text has one rate for all numbers of machines.',
    rule="It holds if the slope of log time against log p is below -0.8 (linear is -1), and fails if it is not. A"
    " mean takes as long as 5 steps, that of one machine, too.",
    scaling=f"{epsilon.SCALING}; the rate is 1. With mini-batches of 128 gradients have little noise, which is all"
    " that more machines reduce: in a pilot run 1 machine and 8 had the same curve. 1 to 8 machines; the text"
    " does not list the paper's.",
    arms=arms,
    judge=judge,
    pretend=lambda holds: epsilon.made_up(losses(-0.9 if holds else -0.6)),
    recipes=("lupa-sgd/figure2-lupa",),
)
