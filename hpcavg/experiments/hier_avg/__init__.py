"""The experiments of the paper of hier-avg, a module each."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment
from hpcavg.experiments.hier_avg import (
    dispersion,
    figure_1,
    figure_1_more_means,
    figure_2,
    figure_2_more_means,
    figure_3,
    figure_4,
    figure_5,
    table_1,
    theorem_3_1,
    theorem_3_2,
    theorem_3_4,
    theorem_3_5,
    theorem_3_6,
)

EXPERIMENTS: tuple[Experiment, ...] = (
    figure_1.EXPERIMENT,
    figure_2.EXPERIMENT,
    figure_1_more_means.EXPERIMENT,
    figure_2_more_means.EXPERIMENT,
    figure_3.EXPERIMENT,
    figure_4.EXPERIMENT,
    table_1.EXPERIMENT,
    figure_5.EXPERIMENT,
    theorem_3_1.EXPERIMENT,
    theorem_3_2.EXPERIMENT,
    theorem_3_4.EXPERIMENT,
    theorem_3_5.EXPERIMENT,
    theorem_3_6.EXPERIMENT,
    dispersion.EXPERIMENT,
)
