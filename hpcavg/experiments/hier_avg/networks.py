"""What the experiments on networks share: data, networks, rates, and how their results are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Line, Plot, Results, Scale
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.training_results import at_end, curves, less
from hpcavg.experiments.verdict import Comparison

# Rates that train well with K2 = 8 and do not diverge with K2 = 32, in a pilot on another seed.
_RATES = {"logistic": 0.5, "mlp": 0.5, "cnn1d": 0.3, "resnet1d": 0.2}
# BatchNorm needs fewer epochs, and takes longer for one.
_EPOCHS = {"logistic": 16, "mlp": 16, "cnn1d": 16, "resnet1d": 12}
# Core-seconds of a run of the full scale with 32 learners; half of them are for steps, however many learners take them.
_SECONDS = {"logistic": 2.5, "mlp": 4.5, "cnn1d": 7.5, "resnet1d": 11.0}
NETWORKS = tuple(_RATES)
"""They stand for the paper's four."""
SCALING = (
    "MNIST-1D with 8,000 samples, mini-batches of 4 and 16 epochs (ResNet: 12) stand for CIFAR-10 with 50,000, 64 and"
    " 200, so that a learner takes 1,000 steps in place of 4,900 (P = 32) and there are fewer rounds; small networks"
    " stand for the paper's; plain SGD and a rate that falls to a tenth after three quarters, as in the paper."
    " The CNN's rate is 0.3: with 0.5 it is better with K2 = 8, but diverged with K2 = 32 in a pilot."
)
_CLASSES = 10
LAST_PART = 0.15
"""The paper plots epochs 170 to 200."""


def trained(scale: Scale, model: str, learners: int, **method: Any) -> Callable[[int], Run]:
    """Return the runs of a network, by seed.

    Parameters
    ----------
    scale : quick runs are on a few samples.
    model : one of `NETWORKS`.
    learners : P.
    **method : algorithm and its options.
    """
    epochs = scale.pick(_EPOCHS[model], 4)
    options = {
        "task": "mnist1d",
        "num_samples": scale.pick(8000, 256),
        "model": model,
        "learners": learners,
        "batch_size": 4,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "learning_rate": _RATES[model],
        "schedule": "step",
        "decay_epochs": [epochs * 3 // 4],
        "epochs": epochs,
    }
    work = scale.pick(_SECONDS[model] * (0.5 + 16 / learners), 1.0)
    return partial(training, work=work, **options, **method)


def by_network(results: Results) -> dict[str, list[str]]:
    """Return the arms of each network. The names of arms are "network, setting"."""
    found: dict[str, list[str]] = {}
    for arm in results:
        found.setdefault(arm.partition(", ")[0], []).append(arm)
    return found


def train_losses(results: Results, last_part: float = LAST_PART) -> dict[str, NDArray[Any]]:
    """Return training losses: by arm, one for each seed; that of guessing for diverged runs.

    Parameters
    ----------
    results : of training runs.
    last_part : the mean is over this part of the epochs, of the last.
    """
    return {arm: np.array([_train_loss(result, last_part) for result in runs]) for arm, runs in results.items()}


def test_errors(results: Results) -> dict[str, NDArray[Any]]:
    """Return the final test error of the mean model: by arm, one for each seed; that of guessing for diverged runs."""
    return {arm: 1 - each for arm, each in at_end(results, "test_accuracy", 1 / _CLASSES).items()}


def _train_loss(result: Result, last_part: float) -> float:
    if result["has_diverged"]:
        return math.log(_CLASSES)
    losses = result["evaluations"]["train_loss"]
    return float(np.mean(losses[-math.ceil(last_part * len(losses)) :]))


def gain(what: str, values: Mapping[str, NDArray[Any]], arm: str, base: str, margin: float = 0.0) -> Comparison:
    """Return the comparison by how many percent `arm` has less of `values` than `base`, seed by seed.

    Parameters
    ----------
    what : names the values.
    values : by arm, such as losses.
    arm : the arm that should have less.
    base : the arm it is compared with.
    margin : in percent; negative for "not much more".
    """
    return less(f"{what}, {arm}: less than {base}", values[arm], values[base], margin)


def plots(results: Results, y: str) -> Sequence[Plot]:
    """Return, for each network, the plot of `y` against epochs."""
    return [
        Plot(f"{model}-{y.replace('_', '-')}", "epoch", y.replace("_", " "), _lines(results, arms, y), title=model)
        for model, arms in by_network(results).items()
    ]


def _lines(results: Results, arms: Sequence[str], y: str) -> list[Line]:
    return curves(Results({arm: results[arm] for arm in arms}), "evaluations", "epoch", y)
