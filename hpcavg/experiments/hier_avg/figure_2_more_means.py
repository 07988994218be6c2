"""Test accuracy does not suffer when K2 grows fourfold, with as many global means as in the paper."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment
from hpcavg.experiments.hier_avg import figure_2
from hpcavg.experiments.hier_avg.figure_1_more_means import SCALING_OF_MEANS, arms

EXPERIMENT = Experiment(
    name="hier-avg-figure-2-more-means",
    paper="hier-avg",
    where="Section 4.1, Figure 2",
    claim="Global means that are rarer do not cost test accuracy, if there are as many of them as in the paper.",
    saw=figure_2.EXPERIMENT.saw,
    rule="It holds if, for every network, K2 = 8 with K1 = 1 makes at most a twentieth more test errors than K2 = 2; it"
    " fails if it makes more than that for one. A run that diverged counts as guessing.",
    scaling=SCALING_OF_MEANS,
    arms=arms,
    judge=figure_2.judge,
    pretend=figure_2.pretend,
    recipes=figure_2.EXPERIMENT.recipes,
)
