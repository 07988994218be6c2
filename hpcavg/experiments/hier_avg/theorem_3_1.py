"""The bound of Theorem 3.1 on the gradient at the mean of the learners, and the rate that follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.hier_avg import bounds
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import Comparison, all_of

# What a slope of -1/2 may miss: K2 must be a whole number.
_SLACK = 0.1


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with a fixed rate and several K2, and runs with the rate and K2 of (3.3) and several T and P."""
    found: dict[str, Callable[[int], Run]] = {}
    fixed = {"learners": scale.pick(32, 8), "steps": scale.pick(1024, 128), "rate": 0.05, "k1": 4, "group_size": 4}
    for problem in scale.pick(("quadratic", "ripples", "logistic"), ("ripples",)):
        for k2 in scale.pick((8, 32), (8,)):
            found[f"{problem}, K2 = {k2}"] = _run(problem, k2=k2, **fixed)
    for problem in scale.pick(("ripples", "logistic"), ("ripples",)):
        middle = scale.pick(2048, 128)
        for learners, steps in ((2, middle), (4, middle // 4), (4, middle), (4, middle * 4), (8, middle)):
            # (3.3), with B = 1
            k2 = max(1, math.floor(steps**0.25 / learners**0.75))
            rate = math.sqrt(learners / steps)
            found[f"{problem}, P = {learners}, T = {steps}"] = _run(
                problem, learners=learners, steps=steps, rate=rate, k1=1, k2=k2, group_size=2
            )
    return found


def _run(problem: str, learners: int, steps: int, **options: Any) -> Callable[[int], Run]:
    # A step takes so many microseconds, and so many for each learner.
    work = 1e-6 * steps * (300 + 25 * learners)
    return partial(
        solving,
        work=work,
        problem=problem,
        algorithm="hier-avg",
        learners=learners,
        steps=steps,
        batch_size=1,
        **options,
    )


def judge(results: Results) -> Finding:
    """Compare norms with bounds, and the slopes of norms against T and P with -1/2."""
    norms = bounds.by_arm(results, bounds.norm_of_all_steps)
    limits = bounds.by_arm(results, bounds.bound_of_all_steps)
    comparisons = [
        Comparison(f"{arm}: room under the bound", (100 * (1 - norms[arm] / limits[arm])).tolist(), unit=" %")
        for arm in results
    ]
    of_rate: dict[str, dict[tuple[int, int], str]] = {}
    for arm, runs in results.items():
        if ", P = " in arm:
            have = runs[0]["settings"]
            of_rate.setdefault(arm.partition(",")[0], {})[have["learners"], have["steps"]] = arm
    for problem, by_size in of_rate.items():
        for number, name, other in ((0, "P", 1), (1, "T", 0)):
            # The arms that share their other size with another arm.
            shared = [size for size in by_size if [each[other] for each in by_size].count(size[other]) > 1]
            comparisons.append(
                bounds.slope(
                    f"{problem}: doublings by which the norm falls when {name} doubles",
                    [size[number] for size in shared],
                    [norms[by_size[size]] for size in shared],
                    sign=-1,
                    margin=0.5 - _SLACK,
                )
            )
    return bounds.finding(results, all_of(*comparisons), norms, limits)


def pretend(holds: bool) -> Results:
    """Return norms that are below their bounds, and fall a little faster than they must, or a little slower."""

    def norm(arm: str, result: Result) -> float:
        have = result["settings"]
        if ", P = " not in arm:
            return 0.9 * bounds.bound_of_all_steps(result)
        return 10 * (have["learners"] * have["steps"]) ** (-0.45 if holds else -0.35)

    return bounds.made_up(arms(Scale(is_quick=True)), norm)


EXPERIMENT = Experiment(
    name="hier-avg-theorem-3-1",
    paper="hier-avg",
    where="Theorem 3.1, (3.2) to (3.4)",
    claim="The mean squared gradient norm stays below the bound, and falls as 1/sqrt(PBT) with the theorem's rate"
    " and K2.",
    saw="A proof, for smooth functions that need not be convex: the mean over T steps is at most"
    " 2 (F - F*)/(rate T) + 4 L^2 rate^2 K2^2 M_G^2 + L rate M/(PB); with rate = sqrt(PB/T) and K2 = T^(1/4)/(PB)^(3/4)"
    " all terms are of order 1/sqrt(PBT).",
    rule="It holds if the norm is below the bound for every problem and setting, and, with that rate and K2 (rounded"
    " down), falls at least as T^(-0.4) at fixed P and as P^(-0.4) at fixed T; it fails if one does not. M_G^2 is the"
    " largest second moment of a gradient that the run met.",
    scaling=bounds.SCALING,
    arms=arms,
    judge=judge,
    pretend=pretend,
)
