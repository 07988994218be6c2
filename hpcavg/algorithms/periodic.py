"""Global means at fixed periods, local means between them, and the two baselines: a mean at every step, and none."""

from __future__ import annotations

from typing import Literal

from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.schedule import every, hierarchical, in_rounds, never, switched_length
from hpcavg.errors import InputError, require_integer


@algorithm(
    source="baseline",
    when="never",
    who="nobody",
    how="the final model is the mean of learners that never met",
    sends="nothing",
    choose="on one learner, or to see what averaging is worth",
)
def sgd() -> Rule:
    """Train every learner alone; the final model is the mean of all learners.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.sgd().name
    'sgd'
    """
    return Rule(always(never))


@algorithm(
    options={"variant": "what is averaged: parameters or gradients"},
    source="baseline of all five papers",
    when="every step",
    who="all",
    how="replace; gradients: the mean gradient, then the step",
    sends="M",
    choose="where the network is no bottleneck, and as the baseline",
)
def sync_sgd(variant: Literal["parameters", "gradients"] = "parameters") -> Rule:
    """Take a global mean at every step.

    With SGD, with or without momentum, both variants are the same up to rounding. With Adam, ``"gradients"`` is the
    usual baseline.

    Parameters
    ----------
    variant : ``"parameters"``: their mean after the step. ``"gradients"``: their mean before the step.

    Raises
    ------
    InputError
        If `variant` is neither of the two.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.sync_sgd("gradients").before_step
    True
    """
    if variant not in ("parameters", "gradients"):
        raise InputError("variant", variant, "parameters or gradients")
    return Rule(always(every(1)), averages=variant, before_step=variant == "gradients")


@algorithm(
    source="Zinkevich et al. 2010; LUPA-SGD, Fig. 2",
    when="after the last step",
    who="all",
    how="replace",
    sends="M/T",
    choose="as the other end of the scale from sync_sgd",
)
def one_shot() -> Rule:
    """Take one global mean, at the end of the run (Zinkevich et al. 2010).

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.one_shot().name
    'one_shot'
    """
    return Rule(always(never))


@algorithm(
    options={"k": "steps between means"},
    source="K-AVG, Algorithm 1",
    when="t mod k = 0",
    who="all",
    how="replace",
    sends="M/k",
    choose="first: one number to tune",
)
def k_avg(k: int = 8) -> Rule:
    """Take a global mean every `k` steps (K-AVG, Algorithm 1).

    Parameters
    ----------
    k : steps between global means, at least 1.

    Raises
    ------
    InputError
        If `k` is not such an integer.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.k_avg(16).options
    {'k': 16}
    """
    require_integer("k", k, 1)
    return Rule(always(every(k)))


@algorithm(
    options={"k1": "steps between local means", "k2": "steps between global means"},
    source="Hier-AVG, Algorithm 1",
    when="phase t mod k2: global at 0, local at multiples of k1",
    who="the local group, then all",
    how="replace",
    sends="M/k2 globally, about M/k1 locally",
    choose="where links inside a node are much faster than between nodes",
)
def hier_avg(k1: int = 4, k2: int = 32) -> Rule:
    """Take a mean over the local group every `k1` steps, over all learners every `k2` (Hier-AVG, Algorithm 1).

    Parameters
    ----------
    k1 : steps between local means, at least 1 and at most `k2`.
    k2 : steps between global means, at least 1. It need not be a multiple of `k1`.

    Raises
    ------
    InputError
        If `k1` or `k2` is not such an integer.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.hier_avg(k1=2).options
    {'k1': 2, 'k2': 32}
    """
    require_integer("k2", k2, 1)
    require_integer("k1", k1, 1)
    if k1 > k2:
        raise InputError("k1", k1, f"an integer of at least 1 and at most k2 = {k2}")
    return Rule(always(hierarchical(k1, k2)))


@algorithm(
    options={"switch_step": "last step that averages at every step"},
    source="Lin et al. 2018",
    when="every step up to switch_step, then (t - switch_step) mod k = 0",
    who="all",
    how="replace",
    sends="M, then M/k",
    choose="where averaging rarely from the start costs accuracy",
)
def post_local_sgd(switch_step: int = 100, k: int = 8) -> Rule:
    """Take a global mean at every step up to `switch_step`, then every `k` steps (post-local SGD, Lin et al. 2018).

    Means are due at steps 1, 2, ..., switch_step, switch_step + k, switch_step + 2 k, ... Torch's
    ``PeriodicModelAverager`` takes the same means with ``period=k`` and ``warmup_steps = switch_step - 1``: it looks
    before it counts, so its first mean comes one step after its warm-up.

    Parameters
    ----------
    switch_step : last step that averages at every step, at least 0.
    k : steps between global means after it, at least 1.

    Raises
    ------
    InputError
        If `switch_step` or `k` is not such an integer.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.post_local_sgd(1000).options
    {'switch_step': 1000, 'k': 8}
    """
    require_integer("switch_step", switch_step, 0)
    require_integer("k", k, 1)
    return Rule(always(in_rounds(switched_length(switch_step, k))))
