"""What a delayed mean costs: of the steps while it is in flight, the share xi counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hpcavg.experiments import progress
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import Comparison, all_of, within

_LEARNERS = 16
_RATE = 0.01
# Steps by which a round may miss the paper's formula, which is of the first order in rate times d.
_MARGIN = 0.2
_REFERENCE = "mini-batch SGD"


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return DaSGD with several (tau, d, xi), of which those of Table 1 and Figure 4, and a run without delay."""
    settings = scale.pick(
        ((4, 1, 0.25), (4, 2, 0.25), (4, 2, 0.0), (4, 2, 0.5), (8, 4, 0.25), (8, 7, 0.25)),
        ((4, 2, 0.25), (8, 4, 0.25)),
    )
    rounds, found = scale.pick(16, 8), {}
    for problem in scale.pick(("quadratic", "ripples"), ("ripples",)):
        longest = rounds * max(tau for tau, _, _ in settings) + 1
        options: dict[str, Any] = {"learners": _LEARNERS, "rate": _RATE, "problem": problem}
        found[f"{problem}, {_REFERENCE}"] = progress.run(**options, steps=longest, algorithm="k-avg", k=1)
        for tau, delay, xi in settings:
            # The last point is that of the last merge.
            found[f"{problem}, tau = {tau}, d = {delay}, xi = {xi}"] = progress.run(
                **options, steps=rounds * tau + delay + 1, algorithm="dasgd", tau=tau, delay=delay, xi=xi
            )
    return found


def judge(results: Results) -> Finding:
    """Compare the progress of a round, in steps without delay, with tau - d + xi d."""
    found: dict[str, NDArray[Any]] = {}
    comparisons: list[Comparison] = []
    for arm, runs in results.items():
        problem, _, setting = arm.partition(", ")
        if setting != _REFERENCE:
            have = runs[0]["settings"]
            rounds = (have["steps"] - 1 - have["delay"]) // have["tau"]
            reference = results.values_of(f"{problem}, {_REFERENCE}", "gradient_norm2")
            total = progress.steps_for(reference, results.values_of(arm, "gradient_norm2")[:, -1])
            found[arm] = (total - have["delay"]) / rounds
            comparisons += within(f"{arm}: steps of a round", found[arm], 0 * total + worth(have), _MARGIN)
    rows = [[*row, f"{worth(results[row[0]][0]['settings']):.2f}"] for row in table_of(found, digits=2)]
    heads = ("problem, setting", "steps that a round is worth", "tau - d + xi d")
    shown = [arm for arm in results if arm.startswith(next(iter(results)).partition(",")[0])]
    return Finding(all_of(*comparisons), heads, rows, [progress.plot(results, shown)])


def worth(settings: Result) -> float:
    """Return how many steps of a round count, of a run with these settings."""
    return settings["tau"] - (1 - settings["xi"]) * settings["delay"]


def pretend(holds: bool) -> Results:
    """Return runs that make the progress of the formula, or that of one more step in each round."""

    def progress_of(options: Mapping[str, Any]) -> float:
        if options["algorithm"] != "dasgd":
            return 1.0
        rounds = (options["steps"] - 1 - options["delay"]) // options["tau"]
        return (options["delay"] + rounds * (worth(options) + (not holds))) / (options["steps"] - 1)

    return progress.made_up(arms(Scale(is_quick=True)), progress_of)


EXPERIMENT = Experiment(
    name="dasgd-update-rule",
    paper="dasgd",
    where="Section 3.2.2",
    claim="The mean of the workers moves by the gradients of the first tau - d steps of a round, and by the share xi of"
    " those of the d steps during which the mean is in flight.",
    saw="A derivation of the update of the averaged weight; the paper draws no conclusion about speed from it.",
    rule="It holds if a round is worth tau - d + xi d steps of mini-batch SGD, to within 0.2 steps, for every setting,"
    " and fails if it is worth more or less for one. The worth is by the step at which mini-batch SGD with the same"
    " noise has the same gradient norm.",
    scaling="The problems have 32 dimensions; rates are small, so that gradients hardly change within a round.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
