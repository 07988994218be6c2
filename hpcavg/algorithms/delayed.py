"""DaSGD: means that travel while the learners compute."""

from __future__ import annotations

from hpcavg.algorithms.merge import Blend, Merge, replace
from hpcavg.algorithms.registry import algorithm
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.schedule import every
from hpcavg.errors import InputError, require_integer, require_number


@algorithm(
    options={
        "delay": "steps from the start of a mean to its merge, below tau",
        "xi": "share of the learner's own parameters in a blend, in [0, 1)",
    },
    source="DaSGD, eq. (4), appendix A.2",
    when="started at t mod tau = 0, merged delay steps later",
    who="all",
    how="x = xi x + (1 - xi) mean",
    sends="M/tau, hidden behind computation",
    choose="where a mean takes no longer than delay steps: it then costs nothing",
)
def dasgd(tau: int = 4, delay: int = 2, xi: float = 0.25) -> Rule:
    """Start a global mean every `tau` steps and blend it in `delay` steps later (DaSGD, eq. 4).

    Parameters
    ----------
    tau : steps between the starts of two means, at least 1.
    delay : steps from the start of a mean to its merge, at least 0 and below `tau`. 0 waits for the mean.
    xi : share of the learner's own parameters in the blend, in [0, 1).

    Raises
    ------
    InputError
        If an argument is out of range.

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.dasgd(tau=8, delay=4).delay_steps
    4
    """
    require_integer("tau", tau, 1)
    is_integer = isinstance(delay, int) and not isinstance(delay, bool)
    if not is_integer or not 0 <= delay < tau:
        raise InputError("delay", delay, f"an integer of at least 0 and below tau = {tau}")
    require_number("xi", xi, lambda x: 0 <= x < 1, "a number of at least 0 and below 1")
    how: Merge = Blend(xi) if xi else replace
    return Rule(always(every(tau)), how=how, how_buffers=how, delay_steps=delay)
