"""Fast workers that go on, where workers have different data."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment, Finding, Results, table_of
from hpcavg.experiments.pr_sgd import uneven
from hpcavg.experiments.training_results import SHARE_PERCENT, accuracy_plot, at_end, more
from hpcavg.experiments.verdict import all_of


def judge(results: Results) -> Finding:
    """Compare the test errors after as many samples and rounds."""
    accuracy = at_end(results, "test_accuracy", diverged=0.1)
    errors = {arm: 1 - of_arm for arm, of_arm in accuracy.items()}
    what = "test errors of Algorithm 3: above those of Algorithm 1"
    judgement = all_of(more(what, errors[uneven.UNEVEN], errors[uneven.EVEN]))
    return Finding(judgement, ("arm", "test accuracy, %"), table_of(accuracy, factor=100), [accuracy_plot(results)])


EXPERIMENT = Experiment(
    name="pr-sgd-assumption-2",
    paper="pr-sgd",
    where="Section Asynchronous Implementations, Assumption 2",
    claim="Where workers' data differ, letting fast workers take more steps drags the mean too far towards theirs.",
    saw="An argument for Assumption 2 (equal distributions); no experiment.",
    rule="Every worker has samples of few classes. It holds if, after as many samples and rounds, Algorithm 3 has over"
    f" {SHARE_PERCENT:.0f} % more test errors than Algorithm 1, and fails if it has not.",
    scaling="MNIST-1D and an MLP. In a round of Algorithm 3, 4 workers take 16 steps and 4 take 4; in one of Algorithm"
    " 1, all 8 take 10. So neither is ahead, and what remains is the drag.",
    arms=lambda scale: uneven.arms(scale, rounds=500, steps_of_even=10, partition="by-class"),
    judge=judge,
    pretend=lambda holds: uneven.made_up(
        {uneven.EVEN: (2.0, 1.5, 1.0), uneven.UNEVEN: (2.0, 1.5, 1.0)},
        {uneven.EVEN: 0.6, uneven.UNEVEN: 0.56 if holds else 0.59},
    ),
)
