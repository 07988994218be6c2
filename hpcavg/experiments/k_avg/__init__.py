"""The experiments of the paper of K-AVG, a module each."""

from __future__ import annotations

from hpcavg.experiments.k_avg import (
    asynchronous_progress,
    best_k,
    best_k_by_learners,
    choice_of_k,
    epoch_time,
    gap_to_sgd,
    larger_rates,
    more_learners,
    own_rates,
    servers,
    speed_ups,
)

EXPERIMENTS = (
    servers.FIGURE_1,
    servers.FIGURE_2,
    own_rates.EXPERIMENT,
    more_learners.EXPERIMENT,
    larger_rates.EXPERIMENT,
    speed_ups.FIGURE_3,
    speed_ups.FIGURE_4,
    choice_of_k.FIGURE_5,
    choice_of_k.FIGURE_6,
    best_k.EXPERIMENT,
    best_k_by_learners.EXPERIMENT,
    gap_to_sgd.EXPERIMENT,
    epoch_time.EXPERIMENT,
    asynchronous_progress.EXPERIMENT,
)
