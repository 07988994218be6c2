"""A rule: one averaging algorithm as WHEN x WHO x HOW, without torch and without MPI."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from hpcavg.algorithms.merge import Merge, replace
from hpcavg.algorithms.schedule import Rate, Run, Schedule


def always(schedule: Schedule) -> Callable[[Run], Schedule]:
    """Return the WHEN that is `schedule` in every run."""
    return lambda run: schedule


@dataclass(frozen=True)
class ServerExchange:
    """What a learner exchanges with a parameter server, in steps of its own.

    Attributes
    ----------
    push_steps : steps between the updates it sends. fetch_steps : steps between the centres it takes.
    elasticity : None: it sends the sum of its own updates and replaces its parameters by the centre (Downpour).
        Otherwise α, from the number of learners: learner and centre move towards each other by α of what parts them,
        at every fetch (EAMSGD).
    """

    push_steps: int
    fetch_steps: int
    elasticity: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Rule:
    """What `Averager` carries out. Made by the constructors in `hpcavg.algorithms`.

    Attributes
    ----------
    name, options : the algorithm's name and the arguments it was made with.
    when : makes the schedule that says which mean is due at a step; its scope says over WHO. Raises `InputError` where
        the run lacks what the schedule follows.
    how : how a global mean of the parameters is merged; local means always replace.
    how_buffers : how a global mean of BatchNorm buffers is merged.
    delay_steps : steps from the start of a global mean to its merge; 0 waits for it.
    averages : what is averaged: the parameters or the gradients.
    before_step : the mean comes before the optimizer's step, which then parts the learners again, instead of after it.
    agrees_on : what learners tell each other at a global mean for the schedule to follow: their training loss, their
        speed, or nothing.
    own_pace : learners may take different numbers of steps between two global means.
    rate : makes the learning-rate schedule that the theory couples to the algorithm; None leaves the rate to the user.
    server : the exchange with a parameter server in place of means.
    optimizer : settings that the local optimizer's parameter groups are given.
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
