"""What the experiments on networks share: data, networks, rates, and how their results are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Line, Plot, Results, Scale, table_of
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import accuracy_plot, at_end, less
from hpcavg.experiments.verdict import Comparison

NETWORKS = ("mlp", "cnn1d")
"""They stand for the paper's eight."""
BATCH = 2
"""Of a learner. The paper's is 32."""
XI = 0.25
"""The learner's share in a blend; the paper's baseline."""
_SCALING = (
    "MNIST-1D with {own} epochs stands for {data}; a learner's mini-batch is 2 in place of 32; {steps};"
    " small networks stand for the paper's. The rate's course and the momentum are the paper's. Its peak is 0.05 in"
    " place of 0.01, a compromise at which SGD trains both with batches of 8 and of 64. The weight decay is"
    " 0.001 in place of 0.01, with which the MLP hardly trains."
)
SCALING = _SCALING.format(
    own="8,192 samples and 24",
    data="CIFAR-10 with 50,000 and 50",
    steps="32 learners take 3,072 steps in place of 2,450",
)
"""What scaling down changes in Table 1 and Figure 3."""
SCALING_OF_FIGURE_4 = _SCALING.format(
    own="8,192 samples and 18",
    data="CIFAR-10 with 50,000 and 50",
    steps="32 learners take 2,304 steps in place of 2,450",
) + (" A small CNN stands for ResNet-50.")
"""What scaling down changes in Figure 4."""
SCALING_OF_FIGURE_5 = _SCALING.format(
    own="4,096 samples and 6", data="ImageNet and 20", steps="8 learners take 1,536 steps"
) + (" Only the MLP is trained.")
"""What scaling down changes in Figure 5."""
SLIGHT_PERCENT = 5.0
"""What counts as a slight change, of the errors. The paper calls up to 0.24 points of 5.3 % errors slight (Table 1)."""
_CLASSES = 10
GUESS_LOSS = math.log(_CLASSES)
"""The loss of guessing."""
# Of 0.03, 0.05 and 0.1, the best of those tried for the mean accuracy of SGD with a batch of 8 and of mini-batch SGD
# with 32 learners, with the seed 100.
_RATE = 0.05
# Core-seconds of the start of a run, and of a step: a part for all learners together, and a part for each.
_START_SECONDS = 1.0
_SECONDS = {"mlp": (6e-4, 1.6e-4), "cnn1d": (1e-3, 1.6e-4)}


def trained(
    scale: Scale, model: str, learners: int | None = None, batch_size: int = BATCH, **method: Any
) -> Callable[[int], Run]:
    """Return the runs of a network, by seed. Those of a figure process the same number of samples.

    Parameters
    ----------
    scale : quick runs are on a few samples.
    model : one of `NETWORKS`.
    learners : m. None: the paper's 32; quick runs have 8.
    batch_size : of a learner.
    **method : algorithm, its options, and options that replace those of all runs.
    """
    num_learners = learners or scale.pick(32, 8)
    num_samples, epochs = scale.pick((8192, 18), (256, 2))
    options: dict[str, Any] = {
        "task": "mnist1d",
        "num_samples": num_samples,
        "model": model,
        "learners": num_learners,
        "batch_size": batch_size,
        "drop_last": True,
        "epochs": epochs,
        "learning_rate": _RATE,
        "schedule": "one-cycle",
        "cycle_shape": "linear",
        "cycle_start": 0.01,
        "cycle_peak": 0.3,
        "cycle_end": 0.01,
        "momentum": 0.9,
        "weight_decay": 0.001,
    }
    options |= method
    of_step, of_learner = _SECONDS[model]
    steps = options["num_samples"] * options["epochs"] / (options["learners"] * options["batch_size"])
    work = _START_SECONDS + steps * (of_step + of_learner * options["learners"])
    return partial(training, work=work, **options)


def dasgd(tau: int, delay: int, xi: float = XI) -> dict[str, Any]:
    """Return the options of DaSGD."""
    return {"algorithm": "dasgd", "tau": tau, "delay": delay, "xi": xi}


def test_errors(results: Results) -> dict[str, NDArray[Any]]:
    """Return the final test errors: by arm, one for each seed; those of guessing for diverged runs."""
    return {arm: 1 - each for arm, each in at_end(results, "test_accuracy", 1 / _CLASSES).items()}


def final(results: Results, name: str) -> dict[str, NDArray[Any]]:
    """Return a final loss: by arm, one for each seed; that of guessing for diverged runs.

    Parameters
    ----------
    results : of training runs.
    name : ``"train_loss"`` or ``"test_loss"``.
    """
    return at_end(results, name, GUESS_LOSS)


def numbers(results: Results) -> NDArray[Any]:
    """Return the numbers at the ends of the names of the arms, such as 4 of "tau = 4"."""
    return np.array([float(arm.rpartition(" ")[2]) for arm in results])


def slopes(x: Sequence[float] | NDArray[Any], values: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return the slopes of values against `x`, by least squares: one for each seed.

    Parameters
    ----------
    x : shape (arms,).
    values : by arm, one for each seed.

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.experiments.dasgd.networks import slopes
    >>> slopes([1, 2, 3], {"a": np.array([1.0, 0.0]), "b": np.array([3.0, 0.0]), "c": np.array([5.0, 0.0])})
    array([2., 0.])
    """
    centred = np.array(x, float)
    centred -= centred.mean()
    return centred @ np.array(list(values.values())) / (centred @ centred)


def not_many_more(errors: Mapping[str, NDArray[Any]], arm: str, base: str, percent: float) -> Comparison:
    """Return the comparison that `arm` makes at most `percent` percent more errors than `base`, seed by seed.

    Parameters
    ----------
    errors : test errors by arm.
    arm : the arm that may be a little worse.
    base : the arm it is compared with.
    percent : of the errors of `base`.
    """
    return less(f"errors, {arm}: fewer than {base}", errors[arm], errors[base], -percent)


def near_slight(holds: bool) -> float:
    """Return the accuracy with which half a slight change is missing to 70 %, or twice a slight change."""
    return 1 - 0.3 * (1 + SLIGHT_PERCENT / 100 * (0.5 if holds else 2))


HEADS = ("arm", "test accuracy, %", "training loss", "test loss")
"""The heads of `table`."""


def table(results: Results) -> list[list[str]]:
    """Return a row for each arm."""
    accuracy = table_of({arm: 1 - each for arm, each in test_errors(results).items()}, factor=100)
    train, test = (table_of(final(results, name), digits=3) for name in ("train_loss", "test_loss"))
    return [[*first, second[1], third[1]] for first, second, third in zip(accuracy, train, test, strict=True)]


def plots(results: Results, parameter: str, is_x_log: bool = True) -> list[Plot]:
    """Return the plots of the final accuracy against a parameter, and of all accuracies against epochs.

    Parameters
    ----------
    results : of training runs, whose names end with the parameter's value.
    parameter : its name.
    is_x_log : the axis is logarithmic.
    """
    accuracy = np.stack([1 - each for each in test_errors(results).values()], axis=1)
    line = Line("DaSGD", numbers(results), accuracy)
    return [Plot("final", parameter, "test accuracy", [line], is_x_log), accuracy_plot(results)]
