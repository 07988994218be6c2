"""What the experiments on epsilon share: logistic regression on made-up samples of 2,000 features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcavg.experiments.experiment import Line, Plot, Results, Scale
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run

BATCH = 128
# Stable: the loss has a curvature of 1/4 along the bias at the start.
RATE = 4.0
# Of a global mean, in steps of a machine: assumed, since small steps make means expensive.
MEAN_STEPS = 5
# Counts as the loss of runs that diverged.
DIVERGED = 10.0
SCALING = (
    "10,000 made-up samples stand for the 400,000 of epsilon. With the paper's rate of 0.01, for mean gradients, their"
    " loss hardly falls in this number of steps. Every machine has a part of the samples for the whole run"
)


def run(scale: Scale, machines: int, steps: int, rate: float, **changes: Any) -> Callable[[int], Run]:
    """Return a run for each seed.

    Parameters
    ----------
    scale : of the experiment.
    machines : p.
    steps : steps of each machine.
    rate : the learning rate.
    **changes : of the options, and the algorithm.
    """
    options = {
        "task": "made-up-epsilon",
        "model": "logistic",
        "num_samples": scale.pick(10_000, 1500),
        # Fixed parts of like classes, as the paper's local shards.
        "partition": "dirichlet",
        "dirichlet_alpha": 1000.0,
        "learners": machines,
        "batch_size": BATCH,
        "steps": steps,
        "learning_rate": rate,
        "momentum": 0.0,
        "weight_decay": 1e-4,
    }
    options |= changes
    work = 0.6 + 5e-6 * machines * steps * options["batch_size"]
    return partial(training, **options, work=work)


def times(results: Results, arm: str, period: float) -> NDArray[Any]:
    """Return the simulated times of the evaluations: a step takes 1, and each mean 5. Shape (seeds, points).

    Parameters
    ----------
    results : of training runs.
    arm : one of the arms.
    period : steps between means.
    """
    steps = results.values_of(arm, "evaluations", "step")
    return steps + MEAN_STEPS * np.floor(steps / period)


def loss_plot(lines: Sequence[Line], x_label: str) -> Plot:
    """Return the plot of the test loss."""
    return Plot("loss", x_label, "test loss of the mean model", lines, is_y_log=True)


def made_up(losses: Mapping[str, ArrayLike], means: Mapping[str, int] | None = None) -> Results:
    """Return made-up results: losses at the ends of epochs of ten steps, and numbers of means."""
    generator = np.random.default_rng(0)

    def result(arm: str) -> dict[str, Any]:
        loss = (np.asarray(losses[arm], float) * (1 + 1e-3 * generator.standard_normal())).tolist()
        number = list(range(1, len(loss) + 1))
        evaluations = {"epoch": number, "step": [10 * each for each in number], "train_loss": loss, "test_loss": loss}
        summary = {"train_loss": loss[-1], "test_loss": loss[-1], "global_averages": (means or {}).get(arm, 1)}
        return {"has_diverged": False, "evaluations": evaluations, "summary": summary}

    return Results({arm: [result(arm) for _ in range(5)] for arm in losses})
