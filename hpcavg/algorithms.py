"""The algorithms by name: each a short recipe of WHEN, WHO and HOW. Light to import: no torch, no MPI.

Every constructor returns a `Rule` for `hpcavg.Averager` and raises `InputError` where an argument cannot be used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from hpcavg.errors import InputError, require_integer
from hpcavg.rule import Rule
from hpcavg.schedule import every, hierarchical, never, switch


def sgd() -> Rule:
    """Learners that never meet: plain SGD on every learner; their mean is the final model."""
    return Rule("sgd", "baseline", never)


def sync_sgd(variant: Literal["parameters", "gradients"] = "parameters") -> Rule:
    """A global mean at every step, of the parameters after the step or of the gradients before it.

    For SGD, with or without momentum, both are the same up to rounding; for Adam `gradients` is the usual baseline.
    """
    if variant not in ("parameters", "gradients"):
        raise InputError("variant", variant, "parameters or gradients")
    return Rule(
        "sync_sgd",
        "baseline",
        every(1),
        averages=variant,
        before_step=variant == "gradients",
        options={"variant": variant},
    )


def one_shot() -> Rule:
    """No mean until the end of the run (Zinkevich et al. 2010)."""
    return Rule("one_shot", "Zinkevich et al. 2010", never)


def k_avg(k: int = 8) -> Rule:
    """A global mean every `k` steps (K-AVG, Algorithm 1)."""
    require_integer("k", k, 1)
    return Rule("k_avg", "K-AVG, Algorithm 1", every(k), options={"k": k})


def hier_avg(k1: int = 4, k2: int = 32) -> Rule:
    """A mean over the local group every `k1` steps, over all learners every `k2` (Hier-AVG, Algorithm 1)."""
    require_integer("k2", k2, 1)
    require_integer("k1", k1, 1)
    if k1 > k2:
        raise InputError("k1", k1, f"an integer of at least 1 and at most k2 = {k2}")
    return Rule("hier_avg", "Hier-AVG, Algorithm 1", hierarchical(k1, k2), options={"k1": k1, "k2": k2})


def pr_sgd(interval: int = 8) -> Rule:
    """Every `interval` steps the global mean, then the step by the learner's own gradient (PR-SGD, Algorithm 1, eq. 2).

    The gradient is the one taken at the learner's own parameters, before they were replaced by the mean; right after
    the step the learners differ again.
    """
    require_integer("interval", interval, 1)
    return Rule(
        "pr_sgd", "PR-SGD, Algorithm 1, eq. (2)", every(interval), before_step=True, options={"interval": interval}
    )


def post_local_sgd(switch_step: int = 100, k: int = 8) -> Rule:
    """`sync_sgd` up to step `switch_step`, then `k_avg(k)` (Lin et al. 2018).

    Steps are counted from the start of the run on both sides of the switch.
    """
    require_integer("switch_step", switch_step, 0)
    require_integer("k", k, 1)
    when = switch(switch_step, every(1), every(k))
    return Rule("post_local_sgd", "Lin et al. 2018", when, options={"switch_step": switch_step, "k": k})


ALGORITHMS: dict[str, Callable[..., Rule]] = {
    constructor.__name__: constructor
    for constructor in (sgd, sync_sgd, one_shot, k_avg, hier_avg, pr_sgd, post_local_sgd)
}


def option_names(name: str) -> tuple[str, ...]:
    """Return the arguments that algorithm `name` takes."""
    return tuple(inspect.signature(ALGORITHMS[name]).parameters)


def all_option_names() -> list[str]:
    """Return the arguments of all algorithms."""
    return sorted({option for name in ALGORITHMS for option in option_names(name)})


def build(name: str, options: dict[str, Any]) -> Rule:
    """Return the rule of algorithm `name`; `options` it does not take are refused by name."""
    accepted = option_names(name)
    for option, value in options.items():
        if option not in accepted:
            takes = f"only {', '.join(accepted)}" if accepted else "no such option"
            raise InputError(option, value, f"left out: {name} takes {takes}")
    return ALGORITHMS[name](**options)
