"""Training does not slow down when K2 grows fourfold, with as many global means as in the paper."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Scale
from hpcavg.experiments.hier_avg import figure_1
from hpcavg.experiments.hier_avg.networks import SCALING, trained
from hpcavg.experiments.run import Run

SCALING_OF_MEANS = (
    SCALING + " All periods are a quarter of the paper's, so that there are 504 global means with K2 = 2 and 126 with"
    " K2 = 8; the paper has 612 with K2 = 8 and 153 with K2 = 32. Only the MLP and the CNN are trained."
)
"""What scaling down changes where there are as many means as in the paper."""


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with two K2 of each network, with K1 = 1 and S = 4. They are those of figure 2, too."""
    learners = scale.pick(32, 8)
    return {
        f"{model}, K2 = {k2}": trained(scale, model, learners, algorithm="hier-avg", k1=1, k2=k2, group_size=4)
        for model in scale.pick(("mlp", "cnn1d"), ("mlp",))
        for k2 in (2, 8)
    }


EXPERIMENT = Experiment(
    name="hier-avg-figure-1-more-means",
    paper="hier-avg",
    where="Section 4.1, Figure 1",
    claim="Global means that are rarer do not slow training, if there are as many of them as in the paper.",
    saw=figure_1.EXPERIMENT.saw,
    rule="It holds if, for every network, the training loss with K2 = 8 and K1 = 1 is at most a twentieth above that"
    " with K2 = 2; it fails if one is more than a twentieth above. The loss is the mean of the last 15 % of the epochs;"
    " a run that diverged has the loss of guessing.",
    scaling=SCALING_OF_MEANS + " Training loss stands for training accuracy.",
    arms=arms,
    judge=figure_1.judge,
    pretend=figure_1.pretend,
    recipes=figure_1.EXPERIMENT.recipes,
)
