"""More local steps make DaSGD slightly less accurate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.dasgd.figure_4a import DELAY, MODEL
from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING_OF_FIGURE_4,
    SLIGHT_PERCENT,
    dasgd,
    final,
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


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several tau."""
    return {f"tau = {tau}": trained(scale, MODEL, **dasgd(tau, DELAY)) for tau in scale.pick((4, 8, 32), (4, 8))}


def judge(results: Results) -> Finding:
    """Fit the slopes of errors and training loss, and compare the largest tau with the smallest."""
    errors, (smallest, *_, largest) = test_errors(results), results
    logs = np.log2(numbers(results))
    judgement = all_of(
        exceeds("errors for each doubling of tau", 100 * slopes(logs, errors), 0, unit=" points"),
        exceeds("training loss for each doubling of tau", slopes(logs, final(results, "train_loss")), 0),
        not_many_more(errors, largest, smallest, SLIGHT_PERCENT),
    )
    return Finding(judgement, HEADS, table(results), plots(results, "tau"))


def pretend(holds: bool) -> Results:
    """Return accuracies that fall a little, or a lot, and losses that rise."""
    accuracy = {"tau = 4": 0.7, "tau = 8": 0.698, "tau = 32": near_slight(holds)}
    return made_up(accuracy, {"tau = 4": 0.3, "tau = 8": 0.35, "tau = 32": 0.4})


EXPERIMENT = Experiment(
    name="dasgd-figure-4c",
    paper="dasgd",
    where="Section 4.3, Figure 4 (c)",
    claim="More local steps between means make DaSGD slightly less accurate, with more training loss.",
    saw="Figure 4 (c): from tau = 4 to 32 the accuracy decreases slightly, and the training loss increases. The text"
    " gives no numbers.",
    rule="It holds if the slopes of test errors and of the last epoch's training loss against log2 tau are above 0, and"
    f" the largest tau makes at most {SLIGHT_PERCENT:.0f} % more errors than the smallest; it fails if one is not so. A"
    " run that diverged counts as guessing.",
    scaling=SCALING_OF_FIGURE_4,
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure4",),
)
