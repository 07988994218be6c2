"""Training loss of a network with means every I steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial

from hpcavg.experiments.experiment import Experiment, Finding, Plot, Results, Scale, table_of
from hpcavg.experiments.functions.training import training
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, at_end, curves, less, made_up, side_by_side
from hpcavg.experiments.verdict import all_of

# The loss of a guess among ten classes: that of runs that diverged.
_CHANCE = math.log(10)
_LEARNERS = 8
_BATCH = 8


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with a mean every I steps. With I = 1 these are means of gradients, as in the paper.

    The rate falls at the paper's parts of the run, after 150 and 275 of 300 epochs. It is the paper's 0.1 for batches
    of 32, scaled to the smaller batches.
    """
    epochs, num_samples = scale.pick((24, 10_000), (2, 2000))
    options = {
        "task": "mnist1d",
        "model": "cnn1d",
        "num_samples": num_samples,
        "learners": _LEARNERS,
        "batch_size": _BATCH,
        "epochs": epochs,
        "learning_rate": 0.1 * _BATCH / 32,
        "momentum": 0.9,
        "weight_decay": 0.0,
        "schedule": "step",
        "decay_epochs": scale.pick([12, 22], [1]),
        "work": epochs * num_samples * 6e-5,
    }
    found = {"I = 1": partial(training, algorithm="sync-sgd", variant="gradients", **options)}
    for interval in scale.pick((4, 8, 16, 32), (4, 32)):
        found[f"I = {interval}"] = partial(training, algorithm="pr-sgd", interval=interval, **options)
    return found


def judge(results: Results) -> Finding:
    """Compare the training loss of the last epoch of each I with that of I = 1."""
    loss = at_end(results, "train_loss", _CHANCE)
    first, *others = results
    judgement = all_of(
        *(less(f"training loss of {arm}: below that of {first}", loss[arm], loss[first]) for arm in others)
    )
    means = {arm: results.values_of(arm, "summary", "global_averages") for arm in results}
    rows = side_by_side(table_of(loss, 3), table_of(means, 0))
    plot = Plot("loss", "epoch", "training loss", curves(results, "evaluations", "epoch", "train_loss"), is_y_log=True)
    return Finding(judgement, ("arm", "training loss", "means"), rows, [plot])


EXPERIMENT = Experiment(
    name="pr-sgd-figure-3",
    paper="pr-sgd",
    where="Section Experiment, Figure 3",
    claim="With a mean every I = 4, 8, 16 or 32 steps, training loss falls as with parallel mini-batch SGD (I = 1).",
    saw="ResNet20 on CIFAR-10, 8 workers, batches of 32, momentum 0.9, rate 0.1, divided by 10 after 150 and 275"
    " epochs. The text has no numbers; it says that model averaging works as well with far less communication.",
    rule=f"It holds if the training loss of the last epoch is at most {SHARE_PERCENT:.0f} % above that of I = 1 for"
    f" every I. It fails if for one I it is more than {SHARE_PERCENT:.0f} % above. Runs that diverge count as"
    " guessing.",
    scaling="MNIST-1D and its convolutional network stand for CIFAR-10 and ResNet20; 3,750 steps of a worker instead of"
    " some 59,000 leave I = 32 only 117 means instead of 1,800.",
    arms=arms,
    judge=judge,
    pretend=lambda holds: made_up(
        {"I = 1": 0.9, "I = 4": 0.9, "I = 32": 0.9},
        {"I = 1": 0.1, "I = 4": 0.1, "I = 32": 0.1025 if holds else 0.11},
    ),
    recipes=("pr-sgd/figure3-pr-sgd", "pr-sgd/figure3-sync-sgd"),
)
