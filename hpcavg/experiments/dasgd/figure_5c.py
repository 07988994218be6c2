"""Longer rounds with longer delays are faster at the beginning, and slightly less accurate in the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.dasgd.figure_5a import run_of
from hpcavg.experiments.dasgd.networks import (
    GUESS_LOSS,
    HEADS,
    SCALING_OF_FIGURE_5,
    SLIGHT_PERCENT,
    dasgd,
    near_slight,
    not_many_more,
    numbers,
    slopes,
    table,
    test_errors,
)
from hpcavg.experiments.experiment import Experiment, Finding, Plot, Results, Scale
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.training_results import accuracy_plot, curves, made_up
from hpcavg.experiments.verdict import all_of, exceeds

# The rate rises in this part of the epochs.
_BEGINNING = 0.2


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs whose delay is one step less than their round."""
    return {
        f"d = {tau - 1}, tau = {tau}": run_of(scale, **dasgd(tau, tau - 1)) for tau in scale.pick((2, 3, 5), (2, 4))
    }


def early_losses(results: Results) -> dict[str, NDArray[np.float64]]:
    """Return the mean training loss of the first fifth of the epochs: by arm, one for each seed.

    That of a diverged run is the loss of guessing.
    """
    return {arm: np.array([_early_loss(result) for result in runs]) for arm, runs in results.items()}


def _early_loss(result: Result) -> float:
    if result["has_diverged"]:
        return GUESS_LOSS
    losses = result["evaluations"]["train_loss"]
    return float(np.mean(losses[: max(1, round(_BEGINNING * len(losses)))]))


def judge(results: Results) -> Finding:
    """Fit the slopes of early losses and of final errors, and compare the longest rounds with the shortest."""
    errors, (shortest, *_, longest) = test_errors(results), results
    taus = numbers(results)
    judgement = all_of(
        exceeds("early training loss saved for each step of tau", -slopes(taus, early_losses(results)), 0),
        exceeds("errors for each step of tau", 100 * slopes(taus, errors), 0, unit=" points"),
        not_many_more(errors, longest, shortest, SLIGHT_PERCENT),
    )
    loss = Plot("loss", "epoch", "training loss", curves(results, "evaluations", "epoch", "train_loss"))
    return Finding(judgement, HEADS, table(results), [accuracy_plot(results), loss])


def pretend(holds: bool) -> Results:
    """Return accuracies that fall slightly, with early losses that fall, or rise."""
    accuracy = {"d = 1, tau = 2": 0.7, "d = 2, tau = 3": 0.698, "d = 4, tau = 5": near_slight(True)}
    sign = 1 if holds else -1
    shift = {"d = 1, tau = 2": 0.0, "d = 2, tau = 3": -0.1 * sign, "d = 4, tau = 5": -0.3 * sign}
    results = made_up(accuracy)
    return Results(
        {
            arm: [
                {**run, "evaluations": {**run["evaluations"], "train_loss": [2 + shift[arm] + 1e-3 * seed, 1.0]}}
                for seed, run in enumerate(runs)
            ]
            for arm, runs in results.items()
        }
    )


EXPERIMENT = Experiment(
    name="dasgd-figure-5c",
    paper="dasgd",
    where="Section 4.4, Figure 5 (c)",
    claim="More local steps with a longer delay converge faster at the beginning, but end slightly less accurate.",
    saw="Figure 5 (c), ResNet-18 on ImageNet, 8 workers, tau from 2 with d = 1 to d = 4: larger local steps and larger"
    " delays converge faster at the beginning, but the final accuracy is slightly poorer. The text gives no numbers.",
    rule="It holds if, against tau, the slope of the training loss in the first fifth of the epochs, in which the rate"
    " rises, is below 0, that of the final test errors is above 0, and the largest tau makes at most"
    f" {SLIGHT_PERCENT:.0f} % more errors than the smallest; it fails if one is not so. A run that diverged counts as"
    " guessing.",
    scaling=SCALING_OF_FIGURE_5,
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure5-dasgd",),
)
