"""Training does not slow down when K2 grows from 8 to 32."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.hier_avg.networks import (
    NETWORKS,
    SCALING,
    by_network,
    gain,
    plots,
    train_losses,
    trained,
)
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, made_up
from hpcavg.experiments.verdict import all_of


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several K2 of each network, with K1 = 4 and S = 4. They are those of figure 2, too."""
    learners = scale.pick(32, 8)
    return {
        f"{model}, K2 = {k2}": trained(scale, model, learners, algorithm="hier-avg", k1=4, k2=k2, group_size=4)
        for model in scale.pick(NETWORKS, ("mlp", "resnet1d"))
        for k2 in scale.pick((8, 16, 32), (8, 16))
    }


def judge(results: Results) -> Finding:
    """Compare the training loss of each K2 with that of the smallest, for each network."""
    losses = train_losses(results)
    judgement = all_of(
        *(
            gain("training loss", losses, arm, first, -SHARE_PERCENT)
            for first, *others in by_network(results).values()
            for arm in others
        )
    )
    heads = ("network, K2", "training loss")
    return Finding(judgement, heads, table_of(losses, digits=3), plots(results, "train_loss"))


def pretend(holds: bool) -> Results:
    """Return losses that are higher with the largest K2, by half of what is comparable or by twice of it."""
    more = 1 + SHARE_PERCENT / 100 * (0.5 if holds else 2)
    loss = {"mlp, K2 = 8": 0.5, "mlp, K2 = 32": 0.5 * more, "cnn1d, K2 = 8": 0.2, "cnn1d, K2 = 32": 0.2}
    return made_up(dict.fromkeys(loss, 0.9), loss)


EXPERIMENT = Experiment(
    name="hier-avg-figure-1",
    paper="hier-avg",
    where="Section 4.1, Figure 1",
    claim="Global means that are rarer, with K2 = 16 or 32 in place of 8, do not slow training.",
    saw="With P = 32, K1 = 4 and S = 4, the training accuracies of K2 = 8, 16 and 32 are similar for ResNet-18 and"
    " GoogLeNet (best: K2 = 32). MobileNet and VGG19 train best with K2 = 8, and better with 32 than with 16.",
    rule="It holds if, for every network, the training losses with K2 = 16 and 32 are at most a twentieth above that"
    " with K2 = 8; it fails if one of them is more than a twentieth above. The loss is the mean of the last 15 % of the"
    " epochs; a run that diverged has the loss of guessing.",
    scaling=SCALING + " Training loss stands for training accuracy.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("hier-avg/figure1",),
)
