"""Records of means, exchanges and updates, and their sums over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hpcavg.algorithms.scope import GLOBAL, SERVER, Scope


class Event(NamedTuple):
    """One mean, or one exchange with the parameter servers.

    Attributes
    ----------
    step : the step at which it was due.
    scope : the learners that took part.
    period_steps : this learner's steps since the last global mean or exchange.
    started_s : its start, in seconds since the averager was made.
    blocked_s : seconds in which it kept this learner from computing.
    in_flight_s : seconds from its start to its end; equal to `blocked_s` for a blocking mean.
    num_bytes : bytes that this learner brought into it, or sent and received.
    sick : the learners whose parameters were not finite; the mean excludes them, and they take it. In an exchange, this
        learner if its parameters were not finite; it takes the centre.
    distances : ||x_j - x̄||² of each learner of this rank before a global mean was merged, NaN if it was sick; empty if
        they were not measured. Their mean over all learners is the consensus distance (1/P) Σ ||x_j - x̄||².
    row : the row of the learner that exchanged with a centre. None: all learners of this rank took part.

    Examples
    --------
    >>> from hpcavg.algorithms.scope import GLOBAL
    >>> from hpcavg.averaging.events import Event
    >>> event = Event(8, GLOBAL, 4, started_s=0.5, blocked_s=0.01, in_flight_s=0.01, num_bytes=400, sick=(2,))
    >>> event.scope.name, event.excluded
    ('global', 1)
    """

    step: int
    scope: Scope
    period_steps: int
    started_s: float
    blocked_s: float
    in_flight_s: float
    num_bytes: int
    sick: tuple[int, ...] = ()
    distances: Sequence[float] = ()
    row: int | None = None

    @property
    def consensus_distance(self) -> float:
        """The mean distance of the learners of this rank that were not sick; NaN if there is none."""
        known = [distance for distance in self.distances if not math.isnan(distance)]
        return sum(known) / len(known) if known else math.nan

    @property
    def excluded(self) -> int:
        """Number of learners that were excluded."""
        return len(self.sick)


@dataclass
class Totals:
    """Sums over all events of a run.

    Attributes
    ----------
    local_averages : number of means over local groups and over neighbours.
    global_averages : number of means over all learners.
    exchanges : number of exchanges of this rank's first learner with parameter servers.
    bytes_averaged : bytes that this learner, the first of its rank, brought into means, or sent and received.
    blocked_s : seconds in which events kept this learner from computing.
    in_flight_s : seconds from start to end, summed over the events.
    excluded : number of learners that were excluded, summed over the events.

    Examples
    --------
    >>> from hpcavg.algorithms.scope import GLOBAL
    >>> from hpcavg.averaging.events import Event, Totals
    >>> totals = Totals()
    >>> totals.add(Event(8, GLOBAL, 4, started_s=0.5, blocked_s=0.01, in_flight_s=0.01, num_bytes=400))
    >>> totals.global_averages, totals.bytes_averaged
    (1, 400)
    """

    local_averages: int = 0
    global_averages: int = 0
    exchanges: int = 0
    bytes_averaged: int = 0
    blocked_s: float = 0.0
    in_flight_s: float = 0.0
    excluded: int = 0

    def add(self, event: Event) -> None:
        """Add `event` to the sums."""
        is_of_first = not event.row
        if event.scope is GLOBAL:
            self.global_averages += 1
        elif event.scope is SERVER:
            self.exchanges += is_of_first
        else:
            self.local_averages += 1
        self.bytes_averaged += event.num_bytes * is_of_first
        self.blocked_s += event.blocked_s
        self.in_flight_s += event.in_flight_s
        self.excluded += event.excluded


@dataclass(frozen=True)
class Arrival:
    """One update that a parameter server applied.

    Attributes
    ----------
    learner : the learner that sent it.
    arrived_s : time of its arrival, in seconds since the server was made. At simulated servers: simulated time, in mean
        durations of a step.
    staleness : number of updates that the server applied between the learner's last fetch and this update.

    Examples
    --------
    >>> from hpcavg.averaging.events import Arrival
    >>> Arrival(learner=3, arrived_s=1.5, staleness=2).staleness
    2
    """

    learner: int
    arrived_s: float
    staleness: int
