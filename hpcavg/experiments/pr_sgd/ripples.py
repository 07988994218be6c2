"""What the theorems' experiments share: PR-SGD on problems that are not convex and have L = 1, with known constants."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Line, Plot, Results
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.run import Run

SCALING = (
    "The problem has 32 dimensions, and all workers have the same function with Gaussian noise; the paper's may differ."
)


NOISY = "noisy-ripples"
"""The noise drives workers from ripple to ripple, so that rare means cost."""


def runs(
    settings: Mapping[str, tuple[int, int, int]], horizon: int | None = None, problem: str = "ripples"
) -> dict[str, Callable[[int], Run]]:
    """Return runs of Algorithm 1 with the rate of Corollary 1, sqrt(N / T) / L.

    Parameters
    ----------
    settings : N, T and I by the name of the arm.
    horizon : the T of the rate; None: that of the run.
    problem : with ripples.
    """
    return {
        arm: partial(
            solving,
            problem=problem,
            algorithm="pr-sgd",
            interval=interval,
            learners=learners,
            steps=steps,
            batch_size=1,
            rate=(learners / (horizon or steps)) ** 0.5,
            work=(150 + 10 * learners) * 1e-6 * steps,
        )
        for arm, (learners, steps, interval) in settings.items()
    }


def largest_interval(learners: int, steps: int) -> int:
    """Return the largest I of Corollary 1: T^(1/4) / N^(3/4), rounded down, at least 1.

    Examples
    --------
    >>> from hpcavg.experiments.pr_sgd.ripples import largest_interval
    >>> largest_interval(4, 16_384), largest_interval(8, 4096)
    (4, 1)
    """
    return max(1, int(steps**0.25 / learners**0.75 + 1e-9))


def mean_norms(results: Results) -> dict[str, NDArray[Any]]:
    """Return what Theorem 1 bounds, by arm and for each seed: the mean over the run of the gradient's squared norm."""
    return {arm: results.values_of(arm, "gradient_norm2").mean(axis=1) for arm in results}


def norm_plot(results: Results) -> Plot:
    """Return the plot of squared gradient norms against steps."""
    lines = [
        Line(arm, results.values_of(arm, "curves", "step")[0], results.values_of(arm, "curves", "gradient_norm2"))
        for arm in results
    ]
    return Plot("gradient", "step", "squared gradient norm at the mean", lines, is_y_log=True)


def made_up(norms: Mapping[str, float | NDArray[Any]]) -> Results:
    """Return made-up results in which a curve of the gradient's squared norm is as given, but for one percent."""
    generator = np.random.default_rng(0)

    def result(curve: NDArray[Any]) -> dict[str, Any]:
        noisy = (curve * (1 + 0.01 * generator.standard_normal())).tolist()
        steps = list(range(len(noisy)))
        constants = {"smoothness": 1.0, "start_gap": 50.0, "variance": 64.0, "second_moment": 100.0}
        return {
            "constants": constants,
            "gradient_norm2": noisy,
            "curves": {"step": steps, "gradient_norm2": noisy, "gap": noisy, "consensus": noisy},
        }

    return Results(
        {
            arm: [result(np.broadcast_to(curve, 8) if np.ndim(curve) == 0 else np.asarray(curve)) for _ in range(5)]
            for arm, curve in norms.items()
        }
    )
