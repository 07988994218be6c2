"""The bound of Theorem 3.2 on the gradient at the global means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.hier_avg import bounds
from hpcavg.experiments.run import Run
from hpcavg.experiments.verdict import Comparison, all_of

# The largest rate that condition (3.5) allows for K2 = 16 is 0.044.
_RATE, _K2 = 0.04, 16


def arms_of(
    scale: Scale, problems: tuple[str, ...], local: tuple[tuple[int, int], ...]
) -> dict[str, Callable[[int], Run]]:
    """Return runs with K2 = 16.

    Parameters
    ----------
    scale : quick runs have fewer learners and steps.
    problems : names of problems.
    local : pairs (K1, S).
    """
    learners, steps = scale.pick(32, 8), scale.pick(1024, 256)
    options = {"learners": learners, "steps": steps, "batch_size": 1, "rate": _RATE, "k2": _K2}
    work = 1e-6 * steps * (300 + 25 * learners)
    return {
        f"{problem}, K1 = {k1}, S = {size}": partial(
            solving, work=work, problem=problem, algorithm="hier-avg", k1=k1, group_size=size, **options
        )
        for problem in problems
        for k1, size in local
    }


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several K1 and S."""
    problems = scale.pick(("quadratic", "noisy-ripples", "logistic"), ("noisy-ripples",))
    return arms_of(scale, problems, scale.pick(((1, 4), (4, 4), (16, 4), (4, 16)), ((1, 4), (4, 4))))


def judge(results: Results) -> Finding:
    """Compare norms with bounds."""
    norms = bounds.by_arm(results, bounds.norm_at_global_means)
    limits = bounds.by_arm(results, bounds.bound_at_global_means)
    judgement = all_of(
        *(
            Comparison(f"{arm}: room under the bound", (100 * (1 - norms[arm] / limits[arm])).tolist(), unit=" %")
            for arm in results
        )
    )
    return bounds.finding(results, judgement, norms, limits)


def pretend(holds: bool) -> Results:
    """Return norms that are a tenth below their bounds, or above."""
    factor = 0.9 if holds else 1.1
    return bounds.made_up(arms(Scale(is_quick=True)), lambda arm, result: factor * bounds.bound_at_global_means(result))


EXPERIMENT = Experiment(
    name="hier-avg-theorem-3-2",
    paper="hier-avg",
    where="Theorem 3.2, (3.6)",
    claim="The mean squared gradient norm at the global means stays below a bound that knows K1 and S.",
    saw="A proof: with k = K2 - delta, the mean over the N global means is at most 2 (F - F*)/(N k rate)"
    " + L rate M K2^2/(PB k) + L^2 rate^2 M K2/(12 B k) ((K2 - K1)(4 K2 + K1 - 3)/S + (K1 - 1)(3 K2 + K1 - 2)), if the"
    " rate is small enough (3.5).",
    rule="It holds if the norm is below the bound for every problem, K1 and S, and fails if one is not. The rate meets"
    " (3.5) for all that delta may be; delta is the largest that the theorem allows.",
    scaling=bounds.SCALING,
    arms=arms,
    judge=judge,
    pretend=pretend,
)
