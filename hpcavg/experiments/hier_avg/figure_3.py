"""Local means that are more frequent speed training up."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment
from hpcavg.experiments.hier_avg import local_means
from hpcavg.experiments.hier_avg.networks import SCALING

EXPERIMENT = Experiment(
    name="hier-avg-figure-3",
    paper="hier-avg",
    where="Section 4.2, Figure 3",
    claim="Local means every 4 steps lower the training loss against every 8.",
    saw="With P = 16, K2 = 32 and S = 4, the training loss from epoch 170 to 200 is lower with K1 = 4 than with K1 = 8,"
    " for all four networks.",
    rule="It holds if the training loss is lower with K1 = 4 for every network, and fails if it is not for one. The"
    " loss is the mean of the last 15 % of the epochs; a run that diverged has the loss of guessing.",
    scaling=SCALING,
    arms=lambda scale: local_means.arms(scale, (4, 4), (8, 4)),
    judge=local_means.judge,
    pretend=local_means.pretend,
    recipes=("hier-avg/figure3",),
)
