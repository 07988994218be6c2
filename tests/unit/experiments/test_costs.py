"""Simulated times, by hand."""

import numpy as np
import pytest

from hpcavg.experiments.functions import costs


def test_rounds_wait_for_the_slowest_learner():
    assert costs.synchronous(np.array([[1.0, 2], [3, 1]]), 0.5) == 6


def test_a_mean_of_four_takes_two_exchanges_there_and_two_back():
    # Halves and quarters: three quarters of the model each way, and as many sums.
    assert costs.mean_s(4, transfer_s=1, latency_s=0.1, sum_s=0.2) == pytest.approx(0.4 + 0.75 * 2.2)


def test_a_server_answers_learners_one_after_the_other():
    # Learner 0 comes at 1 and is served until 1.5, comes again at 2.5; learner 1 comes at 2, is served until 2.5, and
    # comes again at 3.5, when learner 0 has been served until 3.
    assert costs.with_server(np.array([[1.0, 2], [1, 1]]), 0.5, 0) == 4
    # Of three at a time, the last one waits for two others; all of them wait further before they go on.
    assert costs.with_server(np.ones((1, 3)), 0.5, 0.25) == 1 + 3 * 0.5 + 0.25
