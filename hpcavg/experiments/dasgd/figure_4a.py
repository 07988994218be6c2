"""More workers make DaSGD less accurate, by not much."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING_OF_FIGURE_4,
    dasgd,
    not_many_more,
    numbers,
    plots,
    slopes,
    table,
    test_errors,
    trained,
)
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds

MODEL = "cnn1d"
"""The network of Figure 4."""
TAU, DELAY = 4, 2
"""The baseline, with 32 learners and xi = 0.25."""
# In the paper errors grow by 22 %, from about 9 to about 11 %.
_PERCENT = 25.0


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several numbers of learners, which all take the same number of samples."""
    return {
        f"m = {learners}": trained(scale, MODEL, learners, **dasgd(TAU, DELAY))
        for learners in scale.pick((8, 32, 256), (4, 8))
    }


def judge(results: Results) -> Finding:
    """Compare the most learners with the fewest, and fit the slope."""
    errors, (fewest, *_, most) = test_errors(results), results
    points = 100 * slopes(np.log2(numbers(results)), errors)
    judgement = all_of(
        exceeds("errors for each doubling of m", points, 0, unit=" points"),
        not_many_more(errors, most, fewest, _PERCENT),
    )
    return Finding(judgement, HEADS, table(results), plots(results, "learners"))


def pretend(holds: bool) -> Results:
    """Return accuracies that fall by half of what is not much, or by twice of it."""
    last = 1 - 0.3 * (1 + _PERCENT / 100 * (0.5 if holds else 2))
    return made_up({"m = 2": 0.70, "m = 32": 0.69, "m = 128": last})


EXPERIMENT = Experiment(
    name="dasgd-figure-4a",
    paper="dasgd",
    where="Section 4.3, Figure 4 (a)",
    claim="More workers, with the same batch of each, make DaSGD less accurate, but not much.",
    saw="Figure 4 (a): from m = 2 to 256 workers convergence slows down; the accuracy falls by around 2 points and the"
    " training loss grows by 0.31. With 256 there are 2 means in an epoch.",
    rule="It holds if the slope of the test errors against log2 m is above 0, and the run with the most learners makes"
    f" at most {_PERCENT:.0f} % more errors than that with the fewest (in the paper, 22 % more); it fails if one is not"
    " so. A run that diverged counts as guessing.",
    scaling=SCALING_OF_FIGURE_4
    + " m is 8 to 256: fewer learners take too long here. With 256 there are 16 steps and 4 means in an epoch.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure4",),
)
