"""Asynchronous baselines: every learner exchanges with a parameter server."""

from __future__ import annotations

from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule, ServerExchange, always
from hpcavg.algorithms.schedule import never
from hpcavg.errors import require_integer, require_number


@algorithm(
    options={
        "n_push": "steps between updates sent to the server",
        "n_fetch": "steps between parameters taken from the server",
    },
    source="Dean et al. 2012; K-AVG, section 4.1",
    when="pushes at t mod n_push = 0, fetches at t mod n_fetch = 0",
    who="each learner alone with the server ranks",
    how="centre += sum of the learner's updates; x = centre",
    sends="M/n_push + M/n_fetch",
    choose="as the asynchronous baseline",
)
def downpour(n_push: int = 4, n_fetch: int = 4) -> Rule:
    """Send the sum of updates every `n_push` steps and take the centre every `n_fetch` steps (Downpour SGD).

    Parameters
    ----------
    n_push : steps between the updates that a learner sends, at least 1.
    n_fetch : steps between the centres that it takes, at least 1.

    Raises
    ------
    InputError
        If `n_push` or `n_fetch` is not such an integer.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.downpour(n_fetch=8).server.fetch_steps
    8
    """
    require_integer("n_push", n_push, 1)
    require_integer("n_fetch", n_fetch, 1)
    return Rule(always(never), server=ServerExchange(n_push, n_fetch))


@algorithm(
    options={
        "alpha": "elasticity, unset: 0.9/P",
        "momentum": "Nesterov momentum of the local SGD, in [0, 1)",
    },
    source="Zhang, Choromanska, LeCun 2015; K-AVG, section 4.1",
    when="t mod tau = 0",
    who="each learner alone with the server ranks",
    how="e = alpha (x - centre); x -= e, centre += e",
    sends="2 M/tau",
    choose="as the asynchronous baseline that lets learners explore",
)
def eamsgd(tau: int = 4, alpha: float | None = None, momentum: float = 0.9) -> Rule:
    """Draw learner and centre together by `alpha` of their difference every `tau` steps (EAMSGD).

    Parameters
    ----------
    tau : steps between exchanges, at least 1.
    alpha : elasticity, above 0 and below 1. None: 0.9/P with P learners.
    momentum : Nesterov momentum of the local SGD, in [0, 1). The averager sets it in the optimizer, which must be
        ``torch.optim.SGD``. 0 gives EASGD.

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.eamsgd(tau=8).optimizer
    {'momentum': 0.9, 'nesterov': True}
    """
    require_integer("tau", tau, 1)
    if alpha is not None:
        require_number("alpha", alpha, lambda a: 0 < a < 1, "a number above 0 and below 1")
    require_number("momentum", momentum, lambda m: 0 <= m < 1, "a number of at least 0 and below 1")
    exchange = ServerExchange(tau, tau, lambda num_learners: 0.9 / num_learners if alpha is None else alpha)
    return Rule(always(never), server=exchange, optimizer={"momentum": momentum, "nesterov": momentum > 0})
