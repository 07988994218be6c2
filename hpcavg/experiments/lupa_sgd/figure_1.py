"""Larger mini-batches at a fixed rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Line, Results, Scale, table_of
from hpcavg.experiments.lupa_sgd import epsilon
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import at_end, number_in
from hpcavg.experiments.verdict import all_of, exceeds

# The loss of the model at the start, which is zero.
_START = float(np.log(2))
# Counts as the loss of runs that diverged to numbers that are not finite.
_DIVERGED = epsilon.RATE


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with gradients that are means, at one rate."""
    return arms_with(scale, lambda batch: epsilon.RATE)


def arms_with(scale: Scale, rate: Callable[[int], float]) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of SyncSGD on 5 machines with growing mini-batches, of as many samples.

    Parameters
    ----------
    scale : of the experiment.
    rate : returns the rate of a mini-batch's mean gradient, for its size.
    """
    samples, num_samples = scale.pick((81_920, 10_000), (4096, 6000))
    return {
        f"B = {batch}": epsilon.run(
            scale,
            5,
            samples // batch,
            rate(batch),
            algorithm="sync-sgd",
            variant="gradients",
            batch_size=batch,
            num_samples=num_samples,
        )
        for batch in scale.pick((128, 256, 512, 1024), (512, 1024))
    }


def judge(results: Results) -> Finding:
    """Compare the final losses of the two largest mini-batches with the loss at the start."""
    loss = at_end(results, "test_loss", epsilon.DIVERGED)
    small, large = [*results][-2:]
    judgement = all_of(
        exceeds(f"loss of {large} less that at the start", loss[large], _START),
        exceeds(f"loss at the start less that of {small}", _START, loss[small]),
    )
    lines = [
        Line(
            arm,
            5 * number_in(arm, "B") * results.values_of(arm, "evaluations", "step")[0],
            results.values_of(arm, "evaluations", "test_loss"),
        )
        for arm in results
    ]
    return Finding(judgement, ("arm", "test loss"), table_of(loss, 3), [epsilon.loss_plot(lines, "samples")])


def pretend(holds: bool) -> Results:
    """Return results in which the largest mini-batch diverges, or does not."""
    return epsilon.made_up({"B = 512": [0.6, 0.3], "B = 1024": [0.65, 0.9 if holds else 0.4]})


EXPERIMENT = Experiment(
    name="lupa-sgd-figure-1",
    paper="lupa-sgd",
    where="Section 2, Figure 1",
    claim="At a fixed rate, SyncSGD diverges with mini-batches of 1,024 where it converges with 512.",
    saw='Figure 1, logistic regression on epsilon: "Increasing mini-batches can result in divergence as it is the case'
    ' here for mini-batch size of 1024 comparing to mini-batch size of 512."',
    rule="All runs see as many samples. It holds if the test loss with 1,024 ends above ln 2, where it starts, and"
    " that with 512 below. It fails if one of these is not so. Losses of runs whose numbers overflow count as 10."
    " Gradients are means over the mini-batch, which only become less noisy as it grows: on a convex loss, no"
    " divergence is to be expected. lupa-sgd-figure-1-scaled-rate reads the figure the other way.",
    scaling=f"{epsilon.SCALING}; the rate is 4. 5 machines; the sizes are those of a machine's mini-batch.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
