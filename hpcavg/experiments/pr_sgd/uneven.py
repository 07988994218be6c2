"""What the experiments with uneven workers share: Algorithm 3 with 16 steps of half of them, and 4 of the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Line, Plot, Results, Scale
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run

LEARNERS = 8
_SLOW = 4
_SLOW_STEPS = 4
EVEN, UNEVEN = "Algorithm 1", "Algorithm 3"


def arms(scale: Scale, rounds: int, steps_of_even: int, **changes: Any) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of both algorithms with the same number of rounds.

    Parameters
    ----------
    scale : of the experiment.
    rounds : of a full run.
    steps_of_even : steps of every worker in a round of Algorithm 1.
    **changes : of the options.
    """
    rounds, num_samples = scale.pick((rounds, 10_000), (20, 2000))
    fast, found = _SLOW * _SLOW_STEPS, {}
    for arm, ends in ((EVEN, (steps_of_even, steps_of_even)), (UNEVEN, (fast, _SLOW_STEPS))):
        steps_of = [each for each in ends for _ in range(LEARNERS // 2)]
        steps = rounds * sum(steps_of) // LEARNERS
        options = {
            "task": "mnist1d",
            "model": "mlp",
            "num_samples": num_samples,
            "learners": LEARNERS,
            "batch_size": 8,
            "learning_rate": 0.1,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "algorithm": "pr-sgd-hetero",
            "local_steps": steps_of,
            "steps": steps,
            "drop_last": True,
            "work": 0.4 + 1.8e-3 * rounds * max(steps_of),
        }
        found[arm] = partial(training, **(options | changes))
    return found


def times(results: Results, arm: str) -> NDArray[Any]:
    """Return the simulated times of the evaluations, shape (seeds, points), if slow workers take 4 steps in a round.

    A step of a slow worker takes 4 of a fast one. The first worker is a fast one.
    """
    of_fast = _SLOW_STEPS if arm == EVEN else _SLOW * _SLOW_STEPS
    return results.values_of(arm, "evaluations", "step") / of_fast * _SLOW * _SLOW_STEPS


def time_plot(results: Results, name: str, label: str) -> Plot:
    """Return the plot of a column of the evaluations against simulated time."""
    lines = [Line(arm, times(results, arm)[0], results.values_of(arm, "evaluations", name)) for arm in results]
    return Plot("time", "simulated time, in steps of a fast worker", label, lines)


def made_up(losses: Mapping[str, tuple[float, float, float]], accuracy: Mapping[str, float]) -> Results:
    """Return made-up results: losses at the start, half-way and at the end, and accuracies at the end."""
    generator = np.random.default_rng(0)

    def result(arm: str) -> dict[str, Any]:
        loss = (np.array(losses[arm]) + 0.01 * generator.standard_normal(3)).tolist()
        final = accuracy[arm] + 1e-3 * generator.standard_normal()
        steps = [each * (_SLOW_STEPS if arm == EVEN else _SLOW * _SLOW_STEPS) for each in (1, 10, 20)]
        evaluations = {"epoch": [1, 2, 3], "step": steps, "test_loss": loss, "test_accuracy": [0.1, 0.2, final]}
        return {
            "has_diverged": False,
            "evaluations": evaluations,
            "summary": {"test_loss": loss[-1], "test_accuracy": final},
        }

    return Results({arm: [result(arm) for _ in range(5)] for arm in losses})
