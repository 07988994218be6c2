"""A longer delay makes DaSGD slightly less accurate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.dasgd.figure_4a import MODEL
from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING_OF_FIGURE_4,
    SLIGHT_PERCENT,
    dasgd,
    near_slight,
    not_many_more,
    numbers,
    plots,
    slopes,
    table,
    test_errors,
    trained,
)
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds

_TAU = 8


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several delays."""
    return {f"d = {delay}": trained(scale, MODEL, **dasgd(_TAU, delay)) for delay in (0, 2, 7)}


def judge(results: Results) -> Finding:
    """Fit the slope of the errors, and compare the longest delay with none."""
    errors, (shortest, *_, longest) = test_errors(results), results
    judgement = all_of(
        exceeds("errors for each step of delay", 100 * slopes(numbers(results), errors), 0, unit=" points"),
        not_many_more(errors, longest, shortest, SLIGHT_PERCENT),
    )
    return Finding(judgement, HEADS, table(results), plots(results, "delay", is_x_log=False))


def pretend(holds: bool) -> Results:
    """Return accuracies that fall a little, or a lot."""
    return made_up({"d = 0": 0.7, "d = 2": 0.698, "d = 7": near_slight(holds)})


EXPERIMENT = Experiment(
    name="dasgd-figure-4e",
    paper="dasgd",
    where="Section 4.3, Figure 4 (e)",
    claim="A longer delay makes DaSGD slightly less accurate.",
    saw="Figure 4 (e), tau = 8: from d = 0 to 7 convergence slows down and the accuracy decreases slightly. The text"
    " gives no numbers.",
    rule="It holds if the slope of the test errors against d is above 0, and d = 7 makes at most"
    f" {SLIGHT_PERCENT:.0f} % more errors than d = 0; it fails if one is not so. A run that diverged counts as"
    " guessing.",
    scaling=SCALING_OF_FIGURE_4,
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure4",),
)
