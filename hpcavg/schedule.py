"""WHEN: pure functions of a learner's progress that say which mean a step takes.

A schedule is called with the `Progress` of the step being decided and returns the `Scope` of the mean that is
due, or None. It keeps no state, so every learner that agrees on its progress agrees on the answer.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class Scope(str, enum.Enum):
    """The learners a mean is taken over."""

    LOCAL = "local"
    GLOBAL = "global"


@dataclass
class Progress:
    """How far a learner is, in steps counted from 1.

    Attributes
    ----------
    step : the step being taken; 0 before the first.
    round : global means that were due so far.
    round_step : the step at which the last of them was due.
    """

    step: int = 0
    round: int = 0
    round_step: int = 0


Schedule = Callable[[Progress], "Scope | None"]


def never(progress: Progress) -> Scope | None:
    """No mean is ever due."""
    return None


def every(period_steps: int) -> Schedule:
    """A global mean every `period_steps` steps: t mod K = 0 (K-AVG, Algorithm 1)."""

    def due(progress: Progress) -> Scope | None:
        return Scope.GLOBAL if progress.step % period_steps == 0 else None

    return due


def hierarchical(local_period_steps: int, global_period_steps: int) -> Schedule:
    """Local means at the phases K1, 2 K1, ... of every global period K2 (Hier-AVG, Algorithm 1).

    The phase restarts at every global mean, so K2 need not be a multiple of K1; where both are due the global mean
    alone is taken.
    """

    def due(progress: Progress) -> Scope | None:
        phase = progress.step % global_period_steps
        if phase == 0:
            return Scope.GLOBAL
        return Scope.LOCAL if phase % local_period_steps == 0 else None

    return due


def switch(switch_step: int, before: Schedule, after: Schedule) -> Schedule:
    """`before` up to and including step `switch_step`, `after` from then on (post-local SGD)."""

    def due(progress: Progress) -> Scope | None:
        return before(progress) if progress.step <= switch_step else after(progress)

    return due
