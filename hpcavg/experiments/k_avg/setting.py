"""The paper's runs, scaled down: what they share, and the names of their arms."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Line, Plot, Results, Scale, table_of
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import at_end

K = 16
"""Steps between means, and between exchanges with the server, where the paper does not vary them."""

SPREAD = 0.3
"""Of the durations of steps: the standard deviation of their logarithms."""

CHANCE = 0.1
"""The test accuracy of ten classes guessed at random. A run that diverged has it."""

MODELS = ("mlp", "cnn1d")
"""The networks: for vgg, and for nin."""

SCALING = (
    "MNIST-1D with 8,192 samples stands for CIFAR-10; an MLP stands for vgg, and a small CNN for nin. There are 24"
    " epochs of batches of 8 in place of 600 of 16 or 32: learners take a thirtieth or less of the paper's steps and"
    " means. With P = 128 and K = 16 these are 12 means, the paper's 915; with P = 64 and K = 64, 6 and 229. The rate"
    " is halved four times, not eleven; it starts at the highest of 1, 0.3 and 0.1 at which K-AVG with K = 16 and 8"
    " learners trained in pilot runs."
)
"""What scaling down changes in all training runs of this paper."""

LEFT_OUT = "P = 32 and 128, and K = 2 and 32, are left out."
"""What Figures 5 and 6 lack here."""

SIMULATED = "Servers are simulated: steps take random times, messages take none."
"""What else does, in runs with servers."""

RATES = {"mlp": 0.3, "cnn1d": 0.3}
"""What the paper calls γ0: of 1, 0.3 and 0.1, the highest at which K-AVG with K = 16 and P = 8 trained in pilot runs
with the seeds 100 to 102, as it does at the paper's rate."""

SMALL_RATES = {model: rate / 10 for model, rate in RATES.items()}
"""A tenth of them, as in Section 4.1."""

TENTH = ", a tenth of the rate"
"""What the names of arms with `SMALL_RATES` end with."""

SGD_RATES = {"mlp": 0.3, "cnn1d": 0.1}
"""The best of the same for sequential SGD."""

# Core-seconds of a full run with many learners. Runs of few, and with servers, compute fewer steps together.
_WORK = {"mlp": 4.0, "cnn1d": 6.0}


def few_and_most(scale: Scale) -> tuple[int, int]:
    """Return the numbers of learners of Figures 1 and 2."""
    return scale.pick((8, 128), (4, 8))


def learners(scale: Scale) -> tuple[int, ...]:
    """Return the numbers of learners of Figures 5 to 7. With 128 too few means would be left."""
    return scale.pick((8, 16, 64), (4, 8))


def run_of(
    scale: Scale, model: str, num_learners: int, rates: Mapping[str, float] = RATES, **algorithm: Any
) -> Callable[[int], Run]:
    """Return the training run of a seed. All runs of a scale process the same number of samples.

    Parameters
    ----------
    scale : how large it is.
    model : ``"mlp"`` or ``"cnn1d"``.
    num_learners : number of learners.
    rates : the highest rates, by model.
    **algorithm : the option ``algorithm`` and its options.
    """
    slower = (1 + 4 / num_learners) * (1.8 if "num_servers" in algorithm else 1)
    return partial(
        training,
        work=scale.pick(_WORK[model] * slower, 1.0),
        task="mnist1d",
        num_samples=scale.pick(8_192, 512),
        model=model,
        learners=num_learners,
        batch_size=8,
        drop_last=True,
        epochs=scale.pick(24, 2),
        learning_rate=rates[model],
        schedule="step",
        decay_epochs=scale.pick("12,16,20,22", "1"),
        decay_factor=0.5,
        weight_decay=0.0,
        **{"momentum": 0.0, **algorithm},
    )


def k_avg(k: int = K) -> dict[str, Any]:
    """Return the options of K-AVG."""
    return {"algorithm": "k-avg", "k": k}


def servers() -> dict[str, dict[str, Any]]:
    """Return the options of the algorithms with a parameter server, by name. Their steps' durations vary."""
    simulated = {"num_servers": 0, "step_times": f"lognormal:{SPREAD}"}
    return {
        "Downpour": {"algorithm": "downpour", "n_push": K, "n_fetch": K, **simulated},
        "EAMSGD": {"algorithm": "eamsgd", "tau": K, "momentum": 0.9, **simulated},
    }


def split(arm: str) -> tuple[Any, ...]:
    """Return the name and the numbers of an arm.

    >>> from hpcavg.experiments.k_avg.setting import split
    >>> split("mlp, P = 8, K = 4")
    ('mlp', 8, 4)
    """
    name, *numbers = arm.split(", ")
    return (name, *(int(number.rpartition(" ")[2]) for number in numbers))


def accuracies(results: Results) -> dict[str, NDArray[Any]]:
    """Return the final test accuracies by arm, one for each seed. A run that diverged counts as `CHANCE`."""
    return at_end(results, "test_accuracy", CHANCE)


def best_on_others(of_choice: Mapping[Any, NDArray[Any]]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return for each seed the choice that is best on the other seeds, and what it has on this one.

    A choice by the same seeds would make noise look like a gain.

    Parameters
    ----------
    of_choice : by choice, a value for each seed; large values are good.

    Examples
    --------
    >>> from hpcavg.experiments.k_avg.setting import best_on_others
    >>> best_on_others({1: np.array([5.0, 5.0, 5.0]), 4: np.array([9.0, 4.0, 4.0])})
    (array([1, 4, 4]), array([5., 4., 4.]))
    """
    values = np.stack(list(of_choice.values()))
    chosen = (values.sum(axis=1, keepdims=True) - values).argmax(axis=0)
    return np.array(list(of_choice))[chosen], values[chosen, np.arange(values.shape[1])]


HEADS = ("arm", "test accuracy, %", "means, or exchanges with servers, of a learner")
"""Of `table`."""


def table(results: Results) -> list[list[str]]:
    """Return a row for each arm: test accuracy, and how often its learners meet; "-" if that is not known."""
    rows = []
    for row in table_of(accuracies(results), factor=100):
        counts = [results.values_of(row[0], "summary", name) for name in ("global_averages", "exchanges")]
        most = np.max(counts, initial=0, where=np.isfinite(counts))
        rows.append([*row, f"{most:.0f}" if np.isfinite(counts).any() else "-"])
    return rows


def plot_of(name: str, x_label: str, lines: dict[str, dict[int, NDArray[Any]]], y_label: str = "test accuracy") -> Plot:
    """Return a plot of values against a number that doubles.

    Parameters
    ----------
    name : of the plot's file.
    x_label : of the horizontal axis.
    lines : for each line, by the number, a value for each seed.
    y_label : of the vertical axis.
    """
    drawn = [Line(label, list(points), np.stack(list(points.values()), axis=1)) for label, points in lines.items()]
    return Plot(name, x_label, y_label, drawn, is_x_log=True)
