"""A rule: an averaging algorithm as WHEN x WHO x HOW, without torch or MPI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hpcavg.algorithms.merge import Merge, replace
from hpcavg.algorithms.schedule import Rate, Run, Schedule


def always(schedule: Schedule) -> Callable[[Run], Schedule]:
    """Return a WHEN that does not depend on the run: `schedule` in every run."""
    return lambda run: schedule


@dataclass(frozen=True)
class ServerExchange:
    """The exchange of a learner with the parameter servers.

    Attributes
    ----------
    push_steps : the learner's steps from one update that it sends to the next.
    fetch_steps : the learner's steps from one fetch of the centre to the next.
    elasticity : maps the number of learners to α: at every fetch, learner and centre move towards each other by α times
        their difference (EAMSGD). None: the learner sends its changes and takes the centre (Downpour).

    Examples
    --------
    >>> from hpcavg import algorithms
    >>> algorithms.downpour(n_push=2, n_fetch=4).server
    ServerExchange(push_steps=2, fetch_steps=4, elasticity=None)
    """

    push_steps: int
    fetch_steps: int
    elasticity: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Rule:
    """An averaging algorithm for `hpcavg.Averager`. The constructors in `hpcavg.algorithms` make rules.

    Attributes
    ----------
    when : maps a run to its schedule, which says at every step which mean is due. It raises `InputError` if the run
        lacks a number that the schedule needs.
    how : merges a global mean of the parameters. Local means always replace the parameters.
    how_buffers : merges a global mean of the buffers.
    delay_steps : steps from the start of a global mean to its merge. 0: the learners wait for the mean.
    averages : ``"parameters"`` or ``"gradients"``.
    before_step : take the mean before the optimizer's step instead of after it. The learners differ after the step.
    agrees_on : what learners exchange at a global mean, for the schedule: their training ``"loss"``, their ``"speed"``,
        or ``"nothing"``.
    own_pace : learners may take different numbers of steps between two global means.
    rate : maps a run to its learning-rate schedule, if the algorithm has one. None: the rate is the user's.
    server : the exchange with parameter servers, which replaces means. None: there are no servers.
    optimizer : options that the local optimizer's parameter groups get.
    name : the algorithm's name.
    options : the constructor's arguments.

    Examples
    --------
    A rule of one's own takes a global mean every 4 steps, and mixes it with the learner's parameters:

    >>> from hpcavg.algorithms.merge import Blend
    >>> from hpcavg.algorithms.rule import Rule, always
    >>> from hpcavg.algorithms.schedule import every
    >>> rule = Rule(always(every(4)), how=Blend(xi=0.5), name="half")
    >>> rule.delay_steps
    0
    """

    when: Callable[[Run], Schedule]
    how: Merge = replace
    how_buffers: Merge = replace
    delay_steps: int = 0
    averages: Literal["parameters", "gradients"] = "parameters"
    before_step: bool = False
    agrees_on: Literal["nothing", "loss", "speed"] = "nothing"
    own_pace: bool = False
    rate: Callable[[Run], Rate] | None = None
    server: ServerExchange | None = None
    optimizer: dict[str, object] = field(default_factory=dict)
    name: str = ""
    options: dict[str, object] = field(default_factory=dict)
