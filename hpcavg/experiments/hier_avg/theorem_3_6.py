"""Theorem 3.6: with local means, Hier-AVG with rarer global means beats K-AVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.hier_avg import bounds
from hpcavg.experiments.hier_avg.networks import gain
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import all_of

K = 5
K2 = (6, 8)
"""1.2 and 1.6 times K."""
# They meet condition (3.5) for K2 up to 8, and (3.11); L rate P is 11.5. T is a multiple of all periods.
OPTIONS = {"learners": 128, "steps": 120, "batch_size": 32, "rate": 0.09}


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of K-AVG, and of Hier-AVG with a K2 that is larger than K."""
    options = {**OPTIONS, "learners": scale.pick(128, 16), "work": 1.0}
    found: dict[str, Callable[[int], Run]] = {}
    for problem in scale.pick(("ripples", "logistic"), ("ripples",)):
        # K-AVG is Hier-AVG with S = 1: the bound takes K1 = S = 1.
        for k2, size in ((K, 1), *((k2, 4) for k2 in K2)):
            name = f"{problem}, Hier-AVG, K2 = {k2}" if size > 1 else f"{problem}, K-AVG, K = {K}"
            found[name] = partial(
                solving, problem=problem, algorithm="hier-avg", k1=1, k2=k2, group_size=size, **options
            )
    return found


def judge(results: Results) -> Finding:
    """Compare Hier-AVG with K-AVG on each problem."""
    norms = bounds.by_arm(results, bounds.norm_of_all_steps)
    base = ""
    comparisons = []
    for arm in results:
        if ", K-AVG," in arm:
            base = arm
        else:
            comparisons.append(gain("mean squared gradient norm", norms, arm, base, bounds.LEAST_GAIN_PERCENT))
    return bounds.finding(results, all_of(*comparisons), norms, bounds.by_arm(results, bounds.bound_with_one_delta))


def pretend(holds: bool) -> Results:
    """Return norms that are smaller with Hier-AVG, by twice the least gain or by half of it."""
    percent = bounds.LEAST_GAIN_PERCENT * (2 if holds else 0.5)

    def norm(arm: str, result: Result) -> float:
        return 1.0 if ", K-AVG," in arm else 1 - percent / 100

    return bounds.made_up(arms(Scale(is_quick=True)), norm, spread=1e-4)


EXPERIMENT = Experiment(
    name="hier-avg-theorem-3-6",
    paper="hier-avg",
    where="Theorem 3.6",
    claim="With K1 = 1 and S = 4, Hier-AVG with K2 = (1 + a) K, a up to 0.6, trains faster than K-AVG with K.",
    saw="A proof about the bounds, for L rate P far above 1: that of Hier-AVG is below that of K-AVG.",
    rule="It holds if, for K = 5 and K2 = 6 and 8, on every problem, the squared gradient norm at the mean of the"
    f" learners is smaller than with K-AVG by more than {bounds.LEAST_GAIN_PERCENT} %, as a mean over all steps; it"
    " fails if one is not, which says that there is no measurable gain. P = 128. The settings meet the conditions of"
    " Theorems 3.2 and 3.4 with delta = L^2 rate^2, and the bounds in the table have this delta for every K2.",
    scaling=bounds.SCALING
    + " The conditions leave little noise: in a pilot on other seeds, norms differed by less than a hundredth of a"
    " percent.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
