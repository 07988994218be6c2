"""A rate that falls from round to round, against a constant rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale, table_of
from hpcavg.experiments.functions.problems import solving
from hpcavg.experiments.pr_sgd import ripples
from hpcavg.experiments.run import Run
from hpcavg.experiments.verdict import all_of, exceeds

_LEARNERS = 4
# The run is so many times longer than the constant rate is made for.
_TOO_LONG = 16
_FALLING, _CONSTANT = "Algorithm 2", "constant rate"


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return Algorithm 2 with its first rate 1 / L, and Algorithm 1 with I = 4 and the rate for a shorter run."""
    steps = scale.pick(16_384, 1024)
    falling = partial(
        solving,
        problem="ripples",
        algorithm="pr-sgd-time-varying",
        learners=_LEARNERS,
        steps=steps,
        batch_size=1,
        rate=1 / _LEARNERS,
        work=200e-6 * steps,
    )
    return {_FALLING: falling} | ripples.runs({_CONSTANT: (_LEARNERS, steps, 4)}, steps // _TOO_LONG)


def judge(results: Results) -> Finding:
    """Compare the squared norms of the last quarter of the run, and of Algorithm 2 also with an early part."""
    curves = {arm: results.values_of(arm, "gradient_norm2") for arm in results}
    steps = curves[_FALLING].shape[1]
    ends = {arm: np.log2(curve[:, -steps // 4 :].mean(axis=1)) for arm, curve in curves.items()}
    early = np.log2(curves[_FALLING][:, steps // _TOO_LONG // 2 : steps // _TOO_LONG].mean(axis=1))
    judgement = all_of(
        exceeds("log2 of early norm over late norm of Algorithm 2", early, ends[_FALLING], 1),
        exceeds("log2 of late norm at a constant rate over that of Algorithm 2", ends[_CONSTANT], ends[_FALLING], 1),
    )
    heads = ("arm", "log2 of the squared gradient norm, last quarter")
    return Finding(judgement, heads, table_of(ends, 2), [ripples.norm_plot(results)])


def _pretend(holds: bool) -> Results:
    falling = 1 / np.sqrt(np.arange(1, 257)) if holds else np.ones(256)
    return ripples.made_up({_FALLING: falling, _CONSTANT: np.full(256, 0.5)})


EXPERIMENT = Experiment(
    name="pr-sgd-algorithm-2",
    paper="pr-sgd",
    where="Algorithm 2, Theorem 2",
    claim="With a rate that falls as s^(-2/3) and rounds that grow as s^(1/3), accuracy goes on improving the longer"
    " the run is; at a constant rate for a shorter run it stays.",
    saw="A theorem, with a proof and no experiment.",
    rule="The constant rate is that of Corollary 1 for a run of a sixteenth of the length. It holds if the squared"
    " gradient norm of Algorithm 2 more than halves from that sixteenth (its second half) to the last quarter of the"
    " run, and if in this quarter it is below half the norm of the constant rate. It fails if one of these is not so.",
    scaling=f"{ripples.SCALING} 4 workers; the first rate is 1 / L, so that the paper's N / s^(2/3) does not start with"
    " steps too large.",
    arms=arms,
    judge=judge,
    pretend=_pretend,
)
