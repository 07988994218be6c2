"""Runs on problems with known constants: gradient norms as they were, and the constants that bounds are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.run import Result, Run

if TYPE_CHECKING:
    from mpi4py import MPI

    from hpcavg.experiments.problems import Array, Problem

# Points of a curve.
_POINTS = 100
_DIMENSIONS = 32
# Of logistic regression.
_SAMPLES = 512
_L2 = 1 / _SAMPLES
# M of the quadratics.
_NOISE = 64.0


def solving(seed: int, work: float = 1.0, **options: Any) -> Run:
    """Return a run on a problem.

    Parameters
    ----------
    seed : of the learners' noise; the problem and the start are always the same.
    work : how long it takes, compared to other runs.
    **options : of `solve`.

    Examples
    --------
    >>> from hpcavg.experiments.functions.problems import solving
    >>> run = solving(seed=1, problem="ripples", algorithm="k-avg", k=4, learners=8, steps=100, batch_size=1, rate=0.1)
    >>> run.function, run.options["seed"]
    ('problems:solve', 1)
    """
    return Run("problems:solve", {**options, "seed": seed}, work)


def solve(
    comm: MPI.Intracomm,
    folder: Path,
    problem: str,
    algorithm: str,
    learners: int,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    group_size: int | None = None,
    **options: Any,
) -> Result:
    """Train a problem by SGD; return the exact norms of its gradient at the mean of the learners. Collective.

    Parameters
    ----------
    comm : the ranks of the run.
    folder : of the run's records; there are none.
    problem : ``"quadratic"``, ``"ripples"`` (a quadratic with cosines on it, which is not convex),
        ``"noisy-ripples"`` (the noise drives learners from ripple to ripple) or ``"logistic"``. L is 1.
    algorithm : its name, as ``--algorithm`` takes it.
    learners : number of learners.
    steps : steps of every learner, T.
    batch_size : samples of a learner's step, B.
    rate : the learning rate.
    seed : of the learners' noise.
    group_size : learners of a local group.
    **options : of the algorithm.

    Returns
    -------
    Result
        ``settings`` has what was asked for: ``learners`` to ``group_size``, and the algorithm's options.
        ``constants`` has ``smoothness`` (L), ``start_gap`` (F - F* at the start), ``variance`` (M, at all points) and
        ``second_moment`` (M_G^2: the largest squared norm of a gradient at a learner's point in this run, plus M).
        ``gradient_norm2`` has a value for each of the points 0 to T - 1. ``curves`` has lists ``step``,
        ``gradient_norm2``, ``gap`` and ``consensus`` of at most 100 points; each is the mean of a short span.
    """
    from hpcavg.experiments import problems  # here, because lists of experiments import this module

    setting = SETTINGS[problem]()
    watched = _Watched(setting.problem)
    curves = problems.run(
        comm,
        cast("Problem", watched),
        algorithm.replace("-", "_"),
        options,
        learners,
        steps,
        batch_size,
        rate,
        seed,
        start=setting.start,
        group_size=group_size,
        max_points=steps,
    )
    largest = max(comm.allgather(watched.largest_norm2))
    return {
        "settings": {
            "learners": learners,
            "steps": steps,
            "batch_size": batch_size,
            "rate": rate,
            "group_size": group_size,
            **options,
        },
        "constants": {**setting.constants(), "second_moment": largest + setting.variance},
        "gradient_norm2": curves["gradient_norm2"][:-1],
        "curves": {name: _in_spans(values) for name, values in curves.items()},
    }


@dataclass(frozen=True)
class Setting:
    """A problem with L = 1, and how far from its minimum runs start.

    Attributes
    ----------
    problem : the problem.
    start : where all learners start.
    variance : M: the variance of a sample's gradient is nowhere larger.
    """

    problem: Problem
    start: Array
    variance: float

    def constants(self) -> dict[str, float]:
        """Return L, F - F* at the start, and M."""
        start_gap = float(self.problem.value(self.start[None])[0]) - self.problem.minimum
        return {"smoothness": self.problem.smoothness, "start_gap": start_gap, "variance": self.variance}


def _quadratic(ripple: float, noise: float = _NOISE) -> Setting:
    from hpcavg.experiments.problems import Quadratic

    problem = Quadratic(np.geomspace(1 / 16, 1 - ripple, _DIMENSIONS), np.zeros(_DIMENSIONS), noise, ripple)
    return Setting(problem, 4 * np.random.default_rng(0).standard_normal(_DIMENSIONS), noise)


def _logistic() -> Setting:
    """Return a regression whose labels follow a true point; runs start on the other side of zero."""
    from hpcavg.experiments.problems import Logistic

    generator = np.random.default_rng(0)
    rows = generator.standard_normal((_SAMPLES, _DIMENSIONS)) * np.sqrt(np.geomspace(1 / 16, 1, _DIMENSIONS))
    rows *= np.sqrt(4 * (1 - _L2) * _SAMPLES) / np.linalg.norm(rows, 2)
    true = generator.standard_normal(_DIMENSIONS) / 2
    labels = generator.random(_SAMPLES) < 1 / (1 + np.exp(-rows @ true))
    # |g|^2 <= |x|^2 for the gradient g of a sample x without the L2 term, which has no variance.
    return Setting(Logistic(rows, labels, _L2), -4 * true, float((rows**2).sum(axis=1).mean()))


SETTINGS: Mapping[str, Callable[[], Setting]] = {
    "quadratic": cache(lambda: _quadratic(0.0)),
    "ripples": cache(lambda: _quadratic(0.25)),
    "noisy-ripples": cache(lambda: _quadratic(0.25, noise=16 * _NOISE)),
    "logistic": cache(_logistic),
}
"""The problems by name, made when they are first needed."""


class _Watched:
    """A problem that remembers the largest gradient at a learner's point."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self.largest_norm2 = 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._problem, name)

    def sampled(self, points: Array, batches: NDArray[Any]) -> tuple[Array, Array]:
        norms2 = (self._problem.gradient(points) ** 2).sum(axis=1)
        self.largest_norm2 = max(self.largest_norm2, float(norms2.max()))
        return self._problem.sampled(points, batches)


def _in_spans(values: Sequence[float]) -> list[float]:
    """Return the means of short spans of equal length. A rest at the end is left out."""
    width = -(-len(values) // _POINTS)
    return np.reshape(values[: len(values) // width * width], (-1, width)).mean(axis=1).tolist()
