"""Local means over more learners speed training up."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment
from hpcavg.experiments.hier_avg import local_means
from hpcavg.experiments.hier_avg.networks import SCALING

EXPERIMENT = Experiment(
    name="hier-avg-figure-4",
    paper="hier-avg",
    where="Section 4.2, Figure 4",
    claim="Local means over 4 learners lower the training loss against those over 2.",
    saw="With P = 16, K2 = 32 and K1 = 4, the training loss from epoch 170 to 200 is lower with S = 4 than with S = 2,"
    " for all four networks.",
    rule="It holds if the training loss is lower with S = 4 for every network, and fails if it is not for one. The"
    " loss is the mean of the last 15 % of the epochs; a run that diverged has the loss of guessing.",
    scaling=SCALING,
    arms=lambda scale: local_means.arms(scale, (4, 4), (4, 2)),
    judge=local_means.judge,
    pretend=local_means.pretend,
    recipes=("hier-avg/figure4",),
)
