"""What figures 3 and 4 share: the same networks, trained with two kinds of local means."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Finding, Results, Scale, table_of
from hpcavg.experiments.hier_avg.networks import NETWORKS, by_network, gain, plots, train_losses, trained
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of


def arms(scale: Scale, *settings: tuple[int, int]) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with K2 = 32 of each network, with 16 learners and several (K1, S)."""
    learners = scale.pick(16, 8)
    return {
        f"{model}, K1 = {k1}, S = {size}": trained(
            scale, model, learners, algorithm="hier-avg", k1=k1, k2=32, group_size=size
        )
        for model in scale.pick(NETWORKS, ("mlp",))
        for k1, size in settings
    }


def judge(results: Results) -> Finding:
    """Compare the training loss of the first arm of each network with that of the second."""
    losses = train_losses(results)
    judgement = all_of(
        *(gain("training loss", losses, first, second) for first, second in by_network(results).values())
    )
    heads = ("network, K1, S", "training loss")
    return Finding(judgement, heads, table_of(losses, digits=3), plots(results, "train_loss"))


def pretend(holds: bool) -> Results:
    """Return losses of which the first is a twentieth lower than the second, or higher for one network."""
    loss = {"mlp, first": 0.95, "mlp, second": 1.0, "cnn1d, first": 0.2, "cnn1d, second": 0.21 if holds else 0.19}
    return made_up(dict.fromkeys(loss, 0.9), loss)
