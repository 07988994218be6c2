"""Theorem 3.5: frequent local means over many learners speed training up."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.hier_avg import bounds
from hpcavg.experiments.hier_avg.theorem_3_2 import arms_of
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import all_of


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs that differ in K1 with S = 4, and in S with K1 = 4."""
    local = scale.pick(((1, 4), (2, 4), (4, 4), (8, 4), (4, 2), (4, 8), (4, 16)), ((1, 4), (4, 4), (4, 2)))
    return arms_of(scale, ("noisy-ripples",), local)


def judge(results: Results) -> Finding:
    """Compare the slopes of norms against K1 and S with 0."""
    norms = bounds.by_arm(results, bounds.norm_at_global_means)
    problems: dict[str, dict[tuple[int, int], str]] = {}
    for arm, runs in results.items():
        have = runs[0]["settings"]
        problems.setdefault(arm.partition(",")[0], {})[have["k1"], have["group_size"]] = arm
    comparisons = []
    for problem, by_setting in problems.items():
        for number, what, sign in ((0, "rises when K1", 1), (1, "falls when S", -1)):
            shared = [setting for setting in by_setting if setting[1 - number] == 4]
            comparisons.append(
                bounds.slope(
                    f"{problem}: doublings by which the norm {what} doubles",
                    [setting[number] for setting in shared],
                    [norms[by_setting[setting]] for setting in shared],
                    sign,
                    margin=0.0,
                )
            )
    limits = bounds.by_arm(results, bounds.bound_at_global_means)
    return bounds.finding(results, all_of(*comparisons), norms, limits)


def pretend(holds: bool) -> Results:
    """Return norms that rise a little with K1 and fall with S, or the other way round."""

    def norm(arm: str, result: Result) -> float:
        have = result["settings"]
        return (have["k1"] / have["group_size"]) ** (0.01 if holds else -0.01)

    return bounds.made_up(arms(Scale(is_quick=True)), norm)


EXPERIMENT = Experiment(
    name="hier-avg-theorem-3-5",
    paper="hier-avg",
    where="Theorem 3.5",
    claim="Local means that are more frequent (smaller K1) and over more learners (larger S) speed training up.",
    saw="A proof about the bound (3.6): it rises with K1 and falls with S.",
    rule="It holds if the squared gradient norm at the global means rises with K1 and falls with S, by the slope of its"
    " logarithm seed by seed; it fails if one slope has the other sign.",
    scaling=bounds.SCALING
    + " The problem is the one with much noise. Logistic regression, whose noise is small, is left out: in a pilot on"
    " other seeds its effects were 0.15 and 0.02 %, as small as the differences between seeds.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
