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
    push_steps : steps between the updates that the learner sends.
    fetch_steps : steps between the centres that it takes.
    elasticity : maps the number of learners to α: at every fetch, learner and centre move towards each other by α times
        their difference (EAMSGD). None: the learner sends the sum of its updates and takes the centre (Downpour).
    """

    push_steps: int
    fetch_steps: int
    elasticity: Callable[[int], float] | None = None


@dataclass(frozen=True)
class Rule:
    """What `Averager` carries out. Made by the constructors in `hpcavg.algorithms`.

    Attributes
    ----------
    name : the algorithm's name.
    options : the arguments it was made with.
    when : makes the schedule, which returns the scope of the mean that is due at a step. Raises `InputError` if the run
        lacks what the schedule needs.
    how : how a global mean of the parameters is merged; local means always replace.
    how_buffers : how a global mean of BatchNorm buffers is merged.
    delay_steps : steps from the start of a global mean to its merge; 0 waits for it.
    averages : what is averaged: the parameters or the gradients.
    before_step : take the mean before the optimizer's step, not after it; the learners then differ after the step.
    agrees_on : what learners exchange at a global mean for the schedule: their training loss, their speed, or nothing.
    own_pace : learners may take different numbers of steps between two global means.
    rate : makes the learning-rate schedule that the theory couples to the algorithm; None leaves the rate to the user.
    server : the exchange with a parameter server, instead of means.
    optimizer : settings for the local optimizer's parameter groups.
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
