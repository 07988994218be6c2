"""How far a run has come on a problem with known constants, told in steps of another run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hpcavg.experiments.experiment import Line, Plot, Results
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.run import Run


def run(learners: int, steps: int, rate: float, **options: Any) -> Callable[[int], Run]:
    """Return a run whose noise is small beside its progress, of a seed.

    Parameters
    ----------
    learners : number of learners.
    steps : steps of every learner.
    rate : the learning rate.
    **options : the problem, the algorithm, and its options.
    """
    # A step takes so many microseconds, and so many for each learner.
    work = 1e-6 * steps * (300 + 25 * learners)
    return partial(solving, work=work, learners=learners, steps=steps, batch_size=64, rate=rate, **options)


def steps_for(reference: ArrayLike, reached: ArrayLike) -> NDArray[Any]:
    """Return after how many steps the reference run had reached a gradient norm, seed by seed, with fractions.

    Parameters
    ----------
    reference : squared gradient norms of the reference run by step, shape (seeds, steps), falling.
    reached : what another run has reached, shape (seeds,).

    Examples
    --------
    >>> from hpcavg.experiments.progress import steps_for
    >>> steps_for([[16.0, 4.0, 1.0]], [2.0])
    array([1.5])
    """
    curves, values = -np.log(np.asarray(reference, float)), -np.log(np.asarray(reached, float))
    return np.array([np.interp(x, curve, np.arange(len(curve))) for x, curve in zip(values, curves, strict=True)])


def plot(results: Results, arms: Sequence[str]) -> Plot:
    """Return the plot of the squared gradient norm at the mean of the learners against steps."""
    lines = []
    for arm in arms:
        norms = results.values_of(arm, "gradient_norm2")
        lines.append(Line(arm, np.arange(norms.shape[1]), norms))
    return Plot("gradient", "step", "squared gradient norm", lines, is_y_log=True)


def made_up(arms: Mapping[str, Callable[[int], Run]], progress: Callable[[Mapping[str, Any]], float]) -> Results:
    """Return made-up results whose norms fall by two percent for each step of the reference run.

    Parameters
    ----------
    arms : of which only the options are used.
    progress : returns the steps of the reference that a step of a run with these options is worth.
    """
    generator = np.random.default_rng(0)
    found = {}
    for arm, make in arms.items():
        options = dict(make(0).options)
        worth = progress(options) * (1 + 1e-3 * generator.standard_normal((5, 1)))
        norms = 50 * np.exp(-0.02 * worth * np.arange(options["steps"]))
        found[arm] = [{"settings": options, "gradient_norm2": norm.tolist()} for norm in norms]
    return Results(found)
