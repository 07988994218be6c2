"""A rule: one averaging algorithm as WHEN x WHO x HOW, without torch and without MPI."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from hpcavg.merge import Merge, replace
from hpcavg.schedule import Schedule


@dataclass(frozen=True)
class Rule:
    """What `Averager` carries out. Made by the constructors in `hpcavg.algorithms`.

    Attributes
    ----------
    name : the algorithm's name.
    source : paper and equation.
    when : which mean is due at a step; its scope says over WHO.
    how : how a global mean is merged; local means always replace.
    averages : what is averaged: the parameters or the gradients.
    before_step : the mean comes before the optimizer's step, which then parts the learners again, instead of after it.
    options : the arguments the rule was made with.
    """

    name: str
    source: str
    when: Schedule
    how: Merge = replace
    averages: Literal["parameters", "gradients"] = "parameters"
    before_step: bool = False
    options: dict[str, object] = field(default_factory=dict)
