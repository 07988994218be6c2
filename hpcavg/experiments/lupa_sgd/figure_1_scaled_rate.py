"""Larger mini-batches whose gradients are summed."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Scale
from hpcavg.experiments.lupa_sgd import epsilon, figure_1
from hpcavg.experiments.run import Run

# The paper's.
_RATE = 0.01


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with gradients that are sums, at one rate: those with means, at rates in proportion to the size."""
    return figure_1.arms_with(scale, lambda batch: _RATE * batch)


EXPERIMENT = Experiment(
    name="lupa-sgd-figure-1-scaled-rate",
    paper="lupa-sgd",
    where="Section 2, Figure 1",
    claim="At a fixed rate for gradients that are summed over the mini-batch, SyncSGD diverges with mini-batches of"
    " 1,024 where it converges with 512.",
    saw="As for lupa-sgd-figure-1. The paper does not say whether gradients are summed; this is the other way to read"
    " it.",
    rule="All runs see as many samples. It holds if the test loss with 1,024 ends above ln 2, where it starts, and"
    " that with 512 below. It fails if one of these is not so. Losses of runs whose numbers overflow count as 10.",
    scaling=f"{epsilon.SCALING}. Here the rate is the paper's 0.01, for gradients that are summed over a machine's"
    " mini-batch and averaged over 5 machines: 5.1 with 512 and 10.2 with 1,024 for mean gradients. At the start a"
    " rate above 8 is unstable; the curvature of the loss falls as weights grow, so a run may recover.",
    arms=arms,
    judge=figure_1.judge,
    pretend=figure_1.pretend,
)
