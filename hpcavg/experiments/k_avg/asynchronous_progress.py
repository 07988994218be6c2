"""Downpour where its staleness does no harm: P learners make the progress of P times as many steps of SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments import progress
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.run import Run
from hpcavg.experiments.verdict import Comparison, all_of, within

_RATE = 0.002
# Percent.
_MARGIN = 2.0
_REFERENCE = "SGD"


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return Downpour with several numbers of learners and the same number of samples, and SGD with all of these."""
    samples, numbers = scale.pick((640, (4, 8, 16)), (320, (8,)))
    found = {}
    for problem in scale.pick(("quadratic", "ripples"), ("ripples",)):
        options: dict[str, Any] = {"rate": _RATE, "problem": problem}
        found[f"{problem}, {_REFERENCE}"] = progress.run(**options, learners=1, steps=5 * samples // 4, algorithm="sgd")
        for learners in numbers:
            # One step more, since a curve ends at the point of the step before the last.
            found[f"{problem}, P = {learners}"] = progress.run(
                **options,
                learners=learners,
                steps=samples // learners + 1,
                algorithm="downpour",
                n_push=1,
                n_fetch=1,
            )
    return found


def judge(results: Results) -> Finding:
    """Compare the progress, in steps of SGD, with the number of steps that all learners took."""
    found: dict[str, NDArray[Any]] = {}
    comparisons: list[Comparison] = []
    for arm, runs in results.items():
        problem, _, setting = arm.partition(", ")
        if setting != _REFERENCE:
            have = runs[0]["settings"]
            reference = results.values_of(f"{problem}, {_REFERENCE}", "gradient_norm2")
            total = progress.steps_for(reference, results.values_of(arm, "gradient_norm2")[:, -1])
            found[arm] = 100 * total / (have["learners"] * (have["steps"] - 1))
            comparisons += within(f"{arm}: progress", found[arm], np.full_like(total, 100), _MARGIN, " %")
    heads = ("problem, learners", "progress of all steps, % of SGD's")
    shown = [arm for arm in results if _REFERENCE not in arm]
    return Finding(all_of(*comparisons), heads, table_of(found), [progress.plot(results, shown)])


def pretend(holds: bool) -> Results:
    """Return runs that lack half of what they may, or twice as much."""
    share = 1 - (0.5 if holds else 2) * _MARGIN / 100

    def worth(options: Mapping[str, Any]) -> float:
        return share * options["learners"] if options["algorithm"] == "downpour" else 1.0

    return progress.made_up(arms(Scale(is_quick=True)), worth)


EXPERIMENT = Experiment(
    name="k-avg-asgd-linear-speed-up",
    paper="k-avg",
    where="Section 1, of ASGD",
    claim="With a rate that is small enough, asynchronous SGD has SGD's convergence in samples, so P learners are P"
    " times as fast.",
    saw="Cited from others (Hogwild!, Lian et al. 2015). The paper adds that such rates are usually too small for"
    " practical purposes.",
    rule="It holds if Downpour with P learners makes the progress of P times as many steps of SGD, to within two"
    " percent, for every P, and fails if for one P it is off by more. The progress is by the step at which SGD has"
    " the same gradient norm.",
    scaling="The problems have 32 dimensions; learners push and fetch at every step, and take equally long for it.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
