"""With few workers and short rounds, DaSGD is as accurate as local SGD, and more than mini-batch SGD."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING_OF_FIGURE_5,
    SLIGHT_PERCENT,
    dasgd,
    near_slight,
    not_many_more,
    table,
    test_errors,
    trained,
)
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import accuracy_plot, made_up
from hpcavg.experiments.verdict import all_of, exceeds

_LARGE, _LOCAL, _DELAYED = "mini-batch", "local SGD", "DaSGD"
_TAU, _DELAY = 2, 1


def run_of(scale: Scale, **algorithm: Any) -> Callable[[int], Run]:
    """Return the runs of Figure 5: the rate has another course than in Figure 4.

    Parameters
    ----------
    scale : of the experiment.
    **algorithm : its name and options.
    """
    size = scale.pick({"num_samples": 4096, "epochs": 6}, {})
    return trained(scale, "mlp", scale.pick(8, 4), **size, cycle_start=0.1, cycle_peak=0.2, **algorithm)


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return the runs of the three algorithms."""
    return {
        _LARGE: run_of(scale, algorithm="sync-sgd", variant="gradients"),
        _LOCAL: run_of(scale, algorithm="k-avg", k=_TAU),
        _DELAYED: run_of(scale, **dasgd(_TAU, _DELAY)),
    }


def judge(results: Results) -> Finding:
    """Compare DaSGD with both others."""
    errors = test_errors(results)
    above = exceeds(
        "DaSGD: accuracy above mini-batch SGD", 100 * errors[_LARGE], 100 * errors[_DELAYED], unit=" points"
    )
    judgement = all_of(
        above,
        not_many_more(errors, _DELAYED, _LOCAL, SLIGHT_PERCENT),
        not_many_more(errors, _LOCAL, _DELAYED, SLIGHT_PERCENT),
    )
    return Finding(judgement, HEADS, table(results), [accuracy_plot(results)])


def pretend(holds: bool) -> Results:
    """Return accuracies of DaSGD that are slightly below those of local SGD, or more."""
    return made_up({_LARGE: 0.65, _LOCAL: 0.7, _DELAYED: near_slight(holds)})


EXPERIMENT = Experiment(
    name="dasgd-figure-5a",
    paper="dasgd",
    where="Section 4.4, Figure 5 (a)",
    claim="With 8 workers and tau = 2, DaSGD is as accurate as local SGD, and more accurate than mini-batch SGD.",
    saw="Figure 5 (a), ResNet-18 on ImageNet, 8 workers, tau = 2, d = 1: DaSGD has 64.61 % (top 1) and 85.82 % (top 5),"
    " the same as local SGD after 20 epochs, and better than mini-batch SGD, whose numbers the text does not give.",
    rule="It holds if DaSGD is more accurate than mini-batch SGD, and its test errors differ from those of local SGD by"
    f" at most {SLIGHT_PERCENT:.0f} %; it fails if one is not so. A run that diverged counts as guessing.",
    scaling=SCALING_OF_FIGURE_5 + " Ten classes have no top 5.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure5-mini-batch-sgd", "dasgd/figure5-local-sgd", "dasgd/figure5-dasgd"),
)
