"""Fast workers that go on instead of waiting."""

from __future__ import annotations

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Results, table_of
from hpcavg.experiments.pr_sgd import uneven
from hpcavg.experiments.training_results import at_end, side_by_side, times_to
from hpcavg.experiments.verdict import all_of, exceeds


def judge(results: Results) -> Finding:
    """Compare the simulated times until the test loss is what Algorithm 1 has after half of its evaluations."""
    losses = {arm: results.values_of(arm, "evaluations", "test_loss") for arm in results}
    half = losses[uneven.EVEN].shape[1] // 2
    levels = losses[uneven.EVEN][:, half]
    needed = {arm: times_to(levels, uneven.times(results, arm), losses[arm]) for arm in results}
    ratio = np.log2(needed[uneven.EVEN] / needed[uneven.UNEVEN])
    judgement = all_of(exceeds("log2 of the time of Algorithm 1 over that of Algorithm 3", ratio, 0))
    final = table_of(at_end(results, "test_loss", np.inf), 3)
    rows = side_by_side(table_of(needed, 0), final)
    heads = ("arm", "simulated time to the loss", "test loss at the end")
    return Finding(judgement, heads, rows, [uneven.time_plot(results, "test_loss", "test loss")])


EXPERIMENT = Experiment(
    name="pr-sgd-algorithm-3",
    paper="pr-sgd",
    where="Algorithm 3, Theorem 3, Remark 2",
    claim="Where some workers are faster, letting them take more steps (Algorithm 3) converges faster in wall-clock"
    " time than letting them wait (Algorithm 1), at least in the first part of a run from a poor start.",
    saw="A theorem and Figure 2, an example with I_1 = 16 and I_2 = 8; no experiment.",
    rule="It holds if Algorithm 3 needs less time than Algorithm 1 until the test loss that the latter has half-way,"
    " and fails if it needs as much or more.",
    scaling="MNIST-1D and an MLP; time is simulated. Half of the 8 workers take 4 times as long for a step. Both"
    " algorithms have rounds of 4 steps of these; in Algorithm 3, the fast workers take 16 meanwhile. A mean takes no"
    " time: both take as many.",
    arms=lambda scale: uneven.arms(scale, rounds=250, steps_of_even=4, partition="shared"),
    judge=judge,
    pretend=lambda holds: uneven.made_up(
        {uneven.EVEN: (2.0, 1.5, 1.0), uneven.UNEVEN: (1.9, 1.1 if holds else 1.8, 0.9 if holds else 1.4)},
        {uneven.EVEN: 0.6, uneven.UNEVEN: 0.6},
    ),
)
