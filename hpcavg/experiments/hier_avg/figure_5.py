"""Local means between global ones help K-AVG with a large K."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.hier_avg.networks import SCALING, gain, plots, test_errors, train_losses, trained
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of K-AVG, and of Hier-AVG with as many global means, with 16 learners."""
    model, learners = scale.pick("cnn1d", "mlp"), scale.pick(16, 8)
    return {
        f"{model}, K-AVG, K = 43": trained(scale, model, learners, algorithm="k-avg", k=43),
        f"{model}, Hier-AVG, K2 = 43, K1 = 20": trained(
            scale, model, learners, algorithm="hier-avg", k1=20, k2=43, group_size=4
        ),
    }


def judge(results: Results) -> Finding:
    """Compare the training loss over all epochs, and the test errors at the end."""
    k_avg, hier_avg = results
    losses = train_losses(results, last_part=1)
    errors = test_errors(results)
    judgement = all_of(
        gain("training loss of all epochs", losses, hier_avg, k_avg), gain("test errors", errors, hier_avg, k_avg)
    )
    rows = [
        [*of_loss, accuracy]
        for of_loss, (_, accuracy) in zip(
            table_of(losses, digits=3), table_of({arm: 1 - errors[arm] for arm in errors}, factor=100), strict=True
        )
    ]
    shown = [plot for y in ("train_loss", "test_accuracy") for plot in plots(results, y)]
    return Finding(judgement, ("arm", "training loss of all epochs", "test accuracy, %"), rows, shown)


def pretend(holds: bool) -> Results:
    """Return results with which Hier-AVG is better, or K-AVG."""
    better, worse = ("cnn1d, K-AVG", "cnn1d, Hier-AVG")[:: -1 if holds else 1]
    first, second = ("cnn1d, K-AVG", "cnn1d, Hier-AVG")
    accuracy, loss = {better: 0.9, worse: 0.85}, {better: 0.2, worse: 0.5}
    return made_up({arm: accuracy[arm] for arm in (first, second)}, loss)


EXPERIMENT = Experiment(
    name="hier-avg-figure-5",
    paper="hier-avg",
    where="Section 4.4, Figure 5",
    claim="With as many global means, Hier-AVG trains faster than K-AVG and generalizes better.",
    saw="On ImageNet with 16 learners, Hier-AVG (K2 = 43, K1 = 20, S = 4) is ahead of K-AVG (K = 43) from the first"
    " epoch on: by 17.33 points of training accuracy after 46 epochs, and by 1.15 points of training and 0.51 of test"
    " accuracy after 90.",
    rule="It holds if the training loss, as a mean of all epochs, and the test errors at the end are lower with"
    " Hier-AVG; it fails if one is not. A run that diverged counts as guessing.",
    scaling=SCALING + " MNIST-1D stands for ImageNet, too, and the CNN for its network.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("hier-avg/figure5-k-avg", "hier-avg/figure5-hier-avg"),
)
