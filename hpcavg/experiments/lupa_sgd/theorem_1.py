"""The rate of convergence of Corollary 1, O(1 / (p T))."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import log_slopes, number_in
from hpcavg.experiments.verdict import all_of, exceeds

# 1 / T and 1 / p have the slope -1.
_SLOPE = -0.8
# Of the rate 4 / (mu (t + a)). The curvature at the minimum is 0.023 and more; a >= 4 L / mu keeps first steps stable.
_MU = 1 / 64
_SHIFT = 4 * 64


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of growing length, and with growing numbers of machines, with the tau of the corollary."""
    lengths, machines = scale.pick(((512, 1024, 2048, 4096, 8192), (1, 2, 4, 8, 16, 32)), ((128, 256, 512), (1, 4, 8)))
    settings = [(8, steps) for steps in lengths] + [(number, lengths[-1]) for number in machines]
    return {f"p = {number}, T = {steps}": _run(number, steps) for number, steps in settings}


def _run(machines: int, steps: int) -> Callable[[int], Run]:
    tau = round(steps ** (2 / 3) / machines ** (1 / 3))
    return partial(
        solving,
        problem="logistic",
        algorithm="lupa",
        tau=tau,
        mu=_MU,
        shift=4 * tau + _SHIFT,
        learners=machines,
        steps=steps,
        batch_size=1,
        rate=1.0,
        work=(220 + 12 * machines) * 1e-6 * steps,
    )


def judge(results: Results) -> Finding:
    """Fit the slopes of the final gap over the lengths, and over the numbers of machines."""
    gaps = {arm: results.values_of(arm, "curves", "gap")[:, -1] for arm in results}
    settings = {arm: (number_in(arm, "p"), number_in(arm, "T")) for arm in results}
    longest = max(steps for _, steps in settings.values())
    of_machines = [arm for arm, (_, steps) in settings.items() if steps == longest]
    of_machines.sort(key=lambda arm: settings[arm])
    common = next(number for number, steps in settings.values() if steps != longest)
    of_lengths = [arm for arm, (number, _) in settings.items() if number == common]
    of_lengths.sort(key=lambda arm: settings[arm])
    comparisons, plots = [], []
    for name, chosen, index in (("T", of_lengths, 1), ("p", of_machines, 0)):
        x, values = [settings[arm][index] for arm in chosen], np.stack([gaps[arm] for arm in chosen], axis=1)
        slopes = log_slopes(x, values)
        comparisons.append(exceeds(f"negative slope of log gap against log {name}", -slopes, 0, -_SLOPE))
        plots.append(Plot(name, name, "F - F* at the end", [Line("LUPA-SGD", x, values)], True, True))
    return Finding(all_of(*comparisons), ("arm", "F - F* at the end, times 1000"), table_of(gaps, 2, 1e3), plots)


def _pretend(holds: bool) -> Results:
    generator = np.random.default_rng(0)
    settings = [(8, 512), (8, 2048), (8, 8192), (1, 8192), (32, 8192)]
    power = -1.0 if holds else -0.5

    def result(machines: int, steps: int) -> dict[str, object]:
        gap = 100 / steps * float(machines) ** power * (1 + 0.01 * generator.standard_normal())
        return {"curves": {"step": [0, steps], "gap": [10.0, gap]}}

    return Results({f"p = {p}, T = {steps}": [result(p, steps) for _ in range(5)] for p, steps in settings})


EXPERIMENT = Experiment(
    name="lupa-sgd-theorem-1",
    paper="lupa-sgd",
    where="Theorem 1, Corollary 1",
    claim="With tau = T^(2/3) / (p B)^(1/3) and the rate 4 / (mu (t + a)), F - F* at the end is O(1 / (p B T)).",
    saw="A theorem, with a proof; the experiments have a constant rate.",
    rule="It holds if the slopes of log (F - F*) against log T with 8 machines, and against log p in the longest runs,"
    " are both below -0.8 (the corollary's are -1). It fails if one of them is not. In a pilot run the slope against T"
    " was -1.35: the start still decays, so this half of the rule shows that the gap falls fast enough, not that it"
    " falls as 1/T. The mu of the rate is 1/64, near the curvature at the minimum; the theorem's is that of the L2"
    " term, 1/512, with which steps would be 8 times as large.",
    scaling="Logistic regression of 32 dimensions with an L2 term of 1/512, which is strongly convex; B = 1. mu is"
    " 1/64: the curvature at the minimum is larger, but far from the minimum it is smaller.",
    arms=arms,
    judge=judge,
    pretend=_pretend,
)
