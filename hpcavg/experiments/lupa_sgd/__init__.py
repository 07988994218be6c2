"""The experiments of the paper of LUPA-SGD, a module each."""

from __future__ import annotations

from hpcavg.experiments.lupa_sgd import (
    figure_1,
    figure_1_scaled_rate,
    figure_2,
    figure_3,
    figure_3_scaled_rate,
    figure_4,
    theorem_1,
)

EXPERIMENTS = tuple(
    module.EXPERIMENT
    for module in (
        figure_1,
        figure_1_scaled_rate,
        figure_2,
        figure_3,
        figure_3_scaled_rate,
        figure_4,
        theorem_1,
    )
)
