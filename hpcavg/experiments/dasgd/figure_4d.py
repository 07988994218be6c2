"""The learner's share in a blend hardly matters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.dasgd.figure_4a import DELAY, MODEL, TAU
from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING_OF_FIGURE_4,
    SLIGHT_PERCENT,
    XI,
    dasgd,
    near_slight,
    not_many_more,
    plots,
    table,
    test_errors,
    trained,
)
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of

_BASE = f"xi = {XI}"


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several xi."""
    return {
        f"xi = {xi}": trained(scale, MODEL, **dasgd(TAU, DELAY, xi)) for xi in scale.pick((0.0, XI, 0.75), (XI, 0.5))
    }


def judge(results: Results) -> Finding:
    """Compare each xi with the baseline, both ways."""
    errors = test_errors(results)
    others = [arm for arm in results if arm != _BASE]
    judgement = all_of(
        *(not_many_more(errors, arm, _BASE, SLIGHT_PERCENT) for arm in others),
        *(not_many_more(errors, _BASE, arm, SLIGHT_PERCENT) for arm in others),
    )
    return Finding(judgement, HEADS, table(results), plots(results, "xi", is_x_log=False))


def pretend(holds: bool) -> Results:
    """Return accuracies that differ slightly, or more."""
    return made_up({"xi = 0.0": 0.7, _BASE: 0.7, "xi = 0.75": near_slight(holds)})


EXPERIMENT = Experiment(
    name="dasgd-figure-4d",
    paper="dasgd",
    where="Section 4.3, Figure 4 (d)",
    claim="How much a learner keeps of its own parameters in a blend, xi, has little impact on the accuracy.",
    saw="Figure 4 (d): different percentages of local updates have little impact on the accuracy. The text gives no"
    " numbers, and does not list the values.",
    rule=f"It holds if no xi differs from xi = {XI} by more than {SLIGHT_PERCENT:.0f} % of the test errors, and fails"
    " if one does. A run that diverged counts as guessing.",
    scaling=SCALING_OF_FIGURE_4,
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure4",),
)
