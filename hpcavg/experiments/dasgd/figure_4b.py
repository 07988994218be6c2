"""Local batches of a moderate size are best."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.dasgd.figure_4a import DELAY, MODEL, TAU
from hpcavg.experiments.dasgd.networks import (
    BATCH,
    HEADS,
    SCALING_OF_FIGURE_4,
    dasgd,
    plots,
    table,
    test_errors,
    trained,
)
from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with half the batch, and 1, 2 and 8 times the batch; in the paper the first is a quarter."""
    return {
        f"B_l = {size}": trained(scale, MODEL, batch_size=size, **dasgd(TAU, DELAY))
        for size in scale.pick((BATCH // 2, BATCH, 2 * BATCH, 8 * BATCH), (BATCH // 2, BATCH, 8 * BATCH))
    }


def judge(results: Results) -> Finding:
    """Compare each size between with the smallest and the largest."""
    errors, (smallest, *moderate, largest) = test_errors(results), results
    judgement = all_of(
        *(
            exceeds(f"accuracy, {arm} above {end}", 100 * errors[end], 100 * errors[arm], unit=" points")
            for arm in moderate
            for end in (smallest, largest)
        )
    )
    return Finding(judgement, HEADS, table(results), plots(results, "samples of a learner's step"))


def pretend(holds: bool) -> Results:
    """Return accuracies that are highest between the ends, or at one, by a point."""
    return made_up({"B_l = 2": 0.89 if holds else 0.91, "B_l = 8": 0.9, "B_l = 16": 0.9, "B_l = 64": 0.89})


EXPERIMENT = Experiment(
    name="dasgd-figure-4b",
    paper="dasgd",
    where="Section 4.3, Figure 4 (b)",
    claim="Moderate local batches make DaSGD most accurate; smaller and larger ones make it much less accurate.",
    saw="Figure 4 (b): B_l = 32 and 64 have the best accuracies and training losses; with 8 and 256 the accuracy is"
    " significantly reduced. The text gives no numbers.",
    rule="It holds if each size between the smallest and the largest is more accurate than the smallest and than the"
    " largest; it fails if it is less accurate than one of these. A run that diverged counts as guessing.",
    scaling=SCALING_OF_FIGURE_4
    + f" The sizes are {BATCH // 2}, {BATCH}, {2 * BATCH} and {8 * BATCH}. All take the same number of samples, as in"
    " the paper, so the smallest takes the most steps.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("dasgd/figure4",),
)
