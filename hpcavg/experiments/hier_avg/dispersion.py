"""What local means do: they hold the learners together, the more so the more learners take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.hier_avg import bounds
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import Comparison, all_of, within

# Percent. Curvature pulls the learners together by about one.
_MARGIN = 10.0
_RATE = 0.001


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs that differ in K1 and S."""
    learners, steps = scale.pick((32, 400), (16, 200))
    settings = scale.pick(((1, 4), (2, 4), (4, 4), (8, 4), (4, 2), (4, 8), (4, 16)), ((1, 4), (4, 8)))
    return {
        f"{problem}, K1 = {k1}, S = {size}": partial(
            solving,
            work=1e-6 * steps * (300 + 25 * learners),
            problem=problem,
            algorithm="hier-avg",
            k1=k1,
            k2=8,
            group_size=size,
            learners=learners,
            steps=steps,
            batch_size=1,
            rate=_RATE,
        )
        for problem in scale.pick(("quadratic", "ripples"), ("ripples",))
        for k1, size in settings
    }


def predicted(result: Result) -> float:
    """Return the mean squared distance of the learners from their mean, over the steps between two global means.

    A step adds v = rate^2 M / B to a learner's variance. Steps before the last local mean leave v (1/S - 1/P) of it,
    and each step since then adds v (1 - 1/P).
    """
    have = result["settings"]
    since_global = np.arange(have["k2"])
    since_local = since_global % have["k1"]
    of_all = 1 / have["learners"]
    shares = (1 / have["group_size"] - of_all) * (since_global - since_local) + (1 - of_all) * since_local
    return have["rate"] ** 2 * result["constants"]["variance"] / have["batch_size"] * float(shares.mean())


def judge(results: Results) -> Finding:
    """Compare the learners' distances, averaged over all steps, with what local means should leave."""
    found: dict[str, NDArray[Any]] = {}
    comparisons: list[Comparison] = []
    for arm, runs in results.items():
        measured = results.values_of(arm, "curves", "consensus").mean(axis=1)
        found[arm] = 100 * measured / np.array([predicted(result) for result in runs])
        comparisons += within(f"{arm}: dispersion", found[arm], np.full_like(measured, 100), _MARGIN, " %")
    lines = [
        Line(arm, results.values_of(arm, "curves", "step")[0], results.values_of(arm, "curves", "consensus"))
        for arm in results
        if arm.startswith(next(iter(results)).partition(",")[0])
    ]
    plot = Plot("dispersion", "step", "squared distance from the mean", lines, is_y_log=True)
    heads = ("problem, setting", "dispersion, % of what it should be")
    return Finding(all_of(*comparisons), heads, table_of(found), [plot])


def pretend(holds: bool) -> Results:
    """Return runs whose learners are as far apart as they should be, or as if a group had half its learners."""
    made = bounds.made_up(arms(Scale(is_quick=True)), lambda arm, result: predicted(result) * (1 if holds else 2))
    return Results(
        {
            arm: [{**run, "curves": {"step": [0, 1], "consensus": run["gradient_norm2"][:2]}} for run in runs]
            for arm, runs in made.items()
        }
    )


EXPERIMENT = Experiment(
    name="hier-avg-dispersion",
    paper="hier-avg",
    where="Section 3.4, after Theorem 3.5",
    claim="Local means over S learners amortize what infrequent global means cost: between two of these, the learners'"
    " variance is that of the means of groups, 1/S of a learner's own, and what has come since the last local mean.",
    saw="The term (K2 - K1)(4 K2 + K1 - 3)/S + (K1 - 1)(3 K2 + K1 - 2) of the bound (3.6), which sums this variance"
    " over a round.",
    rule="A step adds v = rate^2 M / B to a learner's variance. With P learners, l steps before the last local mean and"
    " r since then, the mean squared distance from the mean of all should be v ((1/S - 1/P) l + (1 - 1/P) r). It holds"
    " if the mean over all steps is within ten percent of this for every K1 and S, and fails if it is not for one.",
    scaling="The problems have 32 dimensions; the rate is small, so that gradients of all learners differ by noise"
    " alone.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
