"""Test accuracy of a network with means every I steps."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment, Finding, Results, table_of
from hpcavg.experiments.pr_sgd import figure_3
from hpcavg.experiments.training_results import SHARE_PERCENT, accuracy_plot, at_end, less, made_up
from hpcavg.experiments.verdict import all_of


def judge(results: Results) -> Finding:
    """Compare the test errors of each I with those of I = 1."""
    accuracy = at_end(results, "test_accuracy", diverged=0.1)
    errors = {arm: 1 - of_arm for arm, of_arm in accuracy.items()}
    first, *others = results
    judgement = all_of(
        *(less(f"test errors of {arm}: below those of {first}", errors[arm], errors[first]) for arm in others)
    )
    return Finding(judgement, ("arm", "test accuracy, %"), table_of(accuracy, factor=100), [accuracy_plot(results)])


EXPERIMENT = Experiment(
    name="pr-sgd-figure-4",
    paper="pr-sgd",
    where="Section Experiment, Figure 4",
    claim="With a mean every I = 4, 8, 16 or 32 steps, test accuracy ends where that of parallel mini-batch SGD does.",
    saw="ResNet20 on CIFAR-10 with 8 workers, as in Figure 3. The text has no numbers.",
    rule=f"It holds if every I has at most {SHARE_PERCENT:.0f} % more test errors than I = 1. It fails if one I has"
    f" over {SHARE_PERCENT:.0f} % more. Runs that diverge count as guessing.",
    scaling=figure_3.EXPERIMENT.scaling,
    arms=figure_3.arms,
    judge=judge,
    pretend=lambda holds: made_up({"I = 1": 0.8, "I = 4": 0.8, "I = 32": 0.795 if holds else 0.78}),
    recipes=figure_3.EXPERIMENT.recipes,
)
