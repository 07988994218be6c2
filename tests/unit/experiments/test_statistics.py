"""What experiments compare runs with, by hand."""

import pytest

from hpcavg.experiments import progress
from hpcavg.experiments.dasgd import update_rule
from hpcavg.experiments.hier_avg import dispersion


def test_the_dispersion_between_global_means():
    """P = 8, S = 2: 1/S - 1/P = 3/8, 1 - 1/P = 7/8; v = 0.1^2 * 64 / 2 = 0.32.

    After 0, 1, 2, 3 steps of K2 = 4 with K1 = 2 it is 0, 7/8, 2 * 3/8, 2 * 3/8 + 7/8: on average 13/16.
    """
    settings = {"learners": 8, "group_size": 2, "k1": 2, "k2": 4, "rate": 0.1, "batch_size": 2}
    result = {"settings": settings, "constants": {"variance": 64.0}}
    assert dispersion.predicted(result) == pytest.approx(0.32 * 13 / 16)
    assert dispersion.predicted({**result, "settings": {**settings, "group_size": 8, "k1": 1}}) == 0


def test_the_worth_of_a_round_of_delayed_means():
    """Eq. (4) with d = 0 is local SGD; with xi = 0 the d steps in flight are lost."""
    worth = [
        update_rule.worth({"tau": 4, "delay": d, "xi": xi}) for d, xi in ((0, 0.25), (2, 0.0), (2, 0.25), (1, 0.25))
    ]
    assert worth == [4, 2, 2.5, 3.25]


def test_progress_is_counted_seed_by_seed_in_steps_of_the_reference():
    """One seed halves its norm in a step, the other quarters it."""
    reference = [[8.0, 4.0, 2.0, 1.0], [16.0, 4.0, 1.0, 0.25]]
    assert progress.steps_for(reference, [2.0, 8.0]) == pytest.approx([2, 0.5])
