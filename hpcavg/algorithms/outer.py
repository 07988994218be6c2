"""An outer optimizer that steps along the way from its last result to the global mean."""

from __future__ import annotations

from hpcavg.algorithms.merge import OuterMomentum
from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.schedule import every
from hpcavg.errors import require_integer, require_number

# Of an outer learning rate: its product with a rate below 1e30 must be one that float32 can hold.
_MOST = 1e8


@algorithm(
    options={
        "beta": "slow momentum, in [0, 1)",
        "outer_lr": "learning rate of the outer optimizer",
    },
    source="Wang et al. 2020, Algorithm 1",
    when="t mod k = 0",
    who="all",
    how="u = beta u + (anchor - mean)/lr, x = anchor - outer_lr lr u",
    sends="M/k",
    choose="to win back accuracy that a long period cost",
)
def slowmo(k: int = 8, beta: float = 0.5, outer_lr: float = 1.0) -> Rule:
    """Take a step of slow momentum towards the global mean every `k` steps (SlowMo, Wang et al. 2020).

    Parameters
    ----------
    k : steps between outer steps, at least 1.
    beta : slow momentum, in [0, 1).
    outer_lr : learning rate of the outer optimizer, positive and below 1e8.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.slowmo(k=16, beta=0.7).options
    {'k': 16, 'beta': 0.7, 'outer_lr': 1.0}
    """
    require_integer("k", k, 1)
    require_number("beta", beta, lambda b: 0 <= b < 1, "a number of at least 0 and below 1")
    require_number("outer_lr", outer_lr, lambda a: 0 < a < _MOST, f"a positive number below {_MOST:g}")
    return Rule(always(every(k)), how=OuterMomentum(outer_lr, beta, nesterov=False, per_rate=True))


@algorithm(
    options={
        "h": "steps between outer steps",
        "outer_momentum": "Nesterov momentum of the outer optimizer, in [0, 1)",
    },
    source="Douillard et al. 2023, Algorithm 1",
    when="t mod h = 0",
    who="all",
    how="Nesterov SGD on anchor - mean",
    sends="M/h",
    choose="with Adam and very long periods, over slow links",
)
def diloco(h: int = 16, outer_lr: float = 0.7, outer_momentum: float = 0.9) -> Rule:
    """Take a step of Nesterov SGD towards the global mean every `h` steps (DiLoCo, Douillard et al. 2023).

    Parameters
    ----------
    h : steps between outer steps, at least 1.
    outer_lr : learning rate of the outer optimizer, positive and below 1e8.
    outer_momentum : its Nesterov momentum, in [0, 1).

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.diloco(h=500).options
    {'h': 500, 'outer_lr': 0.7, 'outer_momentum': 0.9}
    """
    require_integer("h", h, 1)
    require_number("outer_lr", outer_lr, lambda a: 0 < a < _MOST, f"a positive number below {_MOST:g}")
    require_number("outer_momentum", outer_momentum, lambda m: 0 <= m < 1, "a number of at least 0 and below 1")
    return Rule(always(every(h)), how=OuterMomentum(outer_lr, outer_momentum, nesterov=True, per_rate=False))
