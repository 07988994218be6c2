"""The experiments of the paper of DaSGD, a module each."""

from __future__ import annotations

from hpcavg.experiments.dasgd import (
    figure_3,
    figure_4a,
    figure_4b,
    figure_4c,
    figure_4d,
    figure_4e,
    figure_5a,
    figure_5c,
    section_3_3,
    table_1,
    table_1_batch,
    table_1_delay,
    update_rule,
)
from hpcavg.experiments.experiment import Experiment

EXPERIMENTS: tuple[Experiment, ...] = (
    section_3_3.EXPERIMENT,
    update_rule.EXPERIMENT,
    table_1.EXPERIMENT,
    table_1_delay.EXPERIMENT,
    table_1_batch.EXPERIMENT,
    figure_3.EXPERIMENT,
    figure_4a.EXPERIMENT,
    figure_4b.EXPERIMENT,
    figure_4c.EXPERIMENT,
    figure_4d.EXPERIMENT,
    figure_4e.EXPERIMENT,
    figure_5a.EXPERIMENT,
    figure_5c.EXPERIMENT,
)
