"""The experiments of the paper of PR-SGD, a module each."""

from __future__ import annotations

from hpcavg.experiments.pr_sgd import (
    algorithm_2,
    algorithm_3,
    assumption_2,
    corollary_1_interval,
    corollary_1_speed_up,
    figure_3,
    figure_4,
    theorem_1,
)

EXPERIMENTS = tuple(
    module.EXPERIMENT
    for module in (
        figure_3,
        figure_4,
        theorem_1,
        corollary_1_interval,
        corollary_1_speed_up,
        algorithm_2,
        algorithm_3,
        assumption_2,
    )
)
