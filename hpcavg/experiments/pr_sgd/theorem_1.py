"""The bound of Theorem 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.pr_sgd import ripples
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import number_in, side_by_side
from hpcavg.experiments.verdict import all_of, exceeds


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with growing intervals: that of Corollary 1, one in which workers never meet, and between."""
    learners, steps = scale.pick((4, 16_384), (4, 256))
    intervals = sorted({1, ripples.largest_interval(learners, steps), *scale.pick((64, 512), (64,))})
    settings = {f"N = {learners}, T = {steps}, I = {each}": (learners, steps, each) for each in intervals}
    return ripples.runs(settings, problem=ripples.NOISY)


def judge(results: Results) -> Finding:
    """Compare the mean squared norms with the bound of the theorem."""
    found = ripples.mean_norms(results)
    ratios = {}
    for arm, norms in found.items():
        learners, steps, interval = (number_in(arm, name) for name in ("N", "T", "I"))
        rate = (learners / steps) ** 0.5
        smooth, start_gap, variance, second_moment = (
            results.values_of(arm, "constants", name)
            for name in ("smoothness", "start_gap", "variance", "second_moment")
        )
        bound = (
            2 * start_gap / (rate * steps)
            + 4 * (rate * interval * smooth) ** 2 * second_moment
            + smooth * rate * variance / learners
        )
        ratios[arm] = np.log2(bound / norms)
    judgement = all_of(*(exceeds(f"log2 of bound over measured, {arm}", each, 0) for arm, each in ratios.items()))
    rows = side_by_side(table_of(found, 4), table_of(ratios, 2))
    heads = ("arm", "mean squared gradient norm", "log2 of bound over it")
    return Finding(judgement, heads, rows, [ripples.norm_plot(results)])


EXPERIMENT = Experiment(
    name="pr-sgd-theorem-1",
    paper="pr-sgd",
    where="Theorem 1",
    claim="The mean over the run of the squared gradient norm at the workers' mean is at most"
    " 2 (f(x0) - f*) / (gamma T) + 4 gamma^2 I^2 G^2 L^2 + L gamma sigma^2 / N.",
    saw="A theorem, with a proof and no experiment.",
    rule="It holds if the bound is above what was measured for every I, and fails if it is below for one. All"
    " constants are exact; G^2 is the largest squared norm in the run plus sigma^2.",
    scaling=ripples.SCALING,
    arms=arms,
    judge=judge,
    pretend=lambda holds: ripples.made_up(
        {"N = 4, T = 256, I = 1": 1.0, "N = 4, T = 256, I = 64": 1.0 if holds else 1e9}
    ),
)
