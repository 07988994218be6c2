"""What the averager and the parameter server did: one record each, and sums over a run."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hpcavg.algorithms.scope import GLOBAL, SERVER, Scope


@dataclass(frozen=True)
class Event:
    """One mean that was taken, or one exchange with the parameter server.

    Attributes
    ----------
    step : the step at which it was due.
    scope : the learners that took part.
    period_steps : this learner's steps since the last global mean or exchange; for local means, too.
    started_s : when it started, in seconds since the averager was made.
    blocked_s : how long this learner could not compute because of it.
    in_flight_s : from its start until it was there; equal to `blocked_s` for a blocking mean.
    num_bytes : what this learner brought into it, or sent and received.
    consensus_distance : this learner's ||x_j - x̄||² before a global mean was merged; its mean over the learners is the
        consensus distance (1/P) Σ ||x_j - x̄||². NaN if it was not measured.
    sick : the learners that were excluded, because their parameters were not finite, and got the mean; in an exchange,
        this learner, if it took the centre instead of its own parameters.
    """

    step: int
    scope: Scope
    period_steps: int
    started_s: float
    blocked_s: float
    in_flight_s: float
    num_bytes: int
    consensus_distance: float = math.nan
    sick: tuple[int, ...] = ()

    @property
    def excluded(self) -> int:
        """How many learners were left out."""
        return len(self.sick)


@dataclass
class Totals:
    """Sums over all events of a run.

    Attributes
    ----------
    local_averages : means over local groups and over neighbours.
    global_averages : means over all learners.
    exchanges : exchanges with parameter servers.
    bytes_averaged : bytes that this learner brought into them, or sent and received.
    blocked_s : seconds in which this learner could not compute because of them.
    in_flight_s : seconds from their starts until they were there.
    excluded : learners that were excluded, summed over all of them.
    """

    local_averages: int = 0
    global_averages: int = 0
    exchanges: int = 0
    bytes_averaged: int = 0
    blocked_s: float = 0.0
    in_flight_s: float = 0.0
    excluded: int = 0

    def add(self, event: Event) -> None:
        """Count `event`."""
        if event.scope is GLOBAL:
            self.global_averages += 1
        elif event.scope is SERVER:
            self.exchanges += 1
        else:  # over a local group, or neighbours
            self.local_averages += 1
        self.bytes_averaged += event.num_bytes
        self.blocked_s += event.blocked_s
        self.in_flight_s += event.in_flight_s
        self.excluded += event.excluded


@dataclass(frozen=True)
class Arrival:
    """One update that a parameter server applied.

    Attributes
    ----------
    learner : the learner that sent it.
    arrived_s : time of its arrival, in seconds since the server was made.
    staleness : updates that the server applied between the learner's last fetch and this one.
    """

    learner: int
    arrived_s: float
    staleness: int
