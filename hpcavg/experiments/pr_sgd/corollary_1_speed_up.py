"""Linear speed-up in the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.pr_sgd import ripples
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import log_slopes, number_in
from hpcavg.experiments.verdict import all_of, exceeds

# The slope of 1/sqrt(N) is -1/2.
_SLOPE = -0.45
_INTERVAL = 4


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with growing numbers of workers, and T > N^3 as the paper asks."""
    numbers, steps = scale.pick(((1, 2, 4, 8, 16), 8192), ((1, 2, 4, 8), 1024))
    return ripples.runs({f"N = {each}, T = {steps}, I = {_INTERVAL}": (each, steps, _INTERVAL) for each in numbers})


def judge(results: Results) -> Finding:
    """Fit the slope of the mean squared norm over the number of workers."""
    found = ripples.mean_norms(results)
    numbers = [number_in(arm, "N") for arm in results]
    norms = np.stack([*found.values()], axis=1)
    slopes = log_slopes(numbers, norms)
    judgement = all_of(exceeds("negative slope of log norm against log N", -slopes, 0, -_SLOPE))
    plot = Plot("speed-up", "N", "mean squared gradient norm", [Line(f"I = {_INTERVAL}", numbers, norms)], True, True)
    return Finding(judgement, ("arm", "mean squared gradient norm"), table_of(found, 4), [plot])


EXPERIMENT = Experiment(
    name="pr-sgd-corollary-1-speed-up",
    paper="pr-sgd",
    where="Corollary 1, linear speed-up",
    claim="With a fixed I and T > N^3, the mean squared gradient norm is O(1/sqrt(NT)): N workers need one N-th of the"
    " steps.",
    saw="A theorem, with a proof and no experiment.",
    rule="It holds if the norm falls with N at a slope below -0.45 (the theorem's is -1/2), and fails if the slope is"
    " above.",
    scaling=f"{ripples.SCALING} I = 4, 8,192 steps, up to 16 workers.",
    arms=arms,
    judge=judge,
    pretend=lambda holds: ripples.made_up(
        {f"N = {each}, T = 1024, I = 4": each ** (-0.5 if holds else -0.3) for each in (1, 2, 4, 8)}
    ),
)
