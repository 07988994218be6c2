"""Downpour and EAMSGD for several learners in one rank, without servers: exchanges in simulated time.

`EventOrder` says which learners compute a step and in which order they complete them. At the end of its step, a learner
exchanges what is due with one centre, at once. The arithmetic is that of `Worker` and `Server`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpcavg.algorithms.rule import ServerExchange
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.event_order import Completion, EventOrder
from hpcavg.averaging.events import Arrival, Event
from hpcavg.averaging.exchanges import Exchanges
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.paces import Pace
from hpcavg.averaging.replica import Replica
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology


class SimulatedServers(Exchanges):
    """The learners of a rank and the centre with which they exchange.

    `Pace.due` is ``SERVER`` while a learner does not take the next step.

    Parameters
    ----------
    exchange : the rule's exchange.
    replica : holds the parameters.
    optimizer : the local optimizer. The state of a sick learner is dropped.
    paces : the learners, one by one.
    topology : the learners, all in this rank.
    options : the averager's options.
    """

    def __init__(
        self,
        exchange: ServerExchange,
        replica: Replica,
        optimizer: LocalOptimizer,
        paces: Sequence[Pace],
        topology: Topology,
        options: AveragingOptions,
    ) -> None:
        super().__init__(exchange, replica, optimizer, paces, topology, options)
        self._order = EventOrder(len(paces), options.step_times, options.seed, options.total_steps)
        self._centre = [array[0].clone() for array in self._parameters.arrays]
        # Changes that are counted and not pushed yet.
        self._updates = [torch.zeros_like(array) for array in self._counted]
        self._version = 0
        self._fetched_version = [0] * len(paces)
        self._time = 0.0
        self._arrivals: deque[Arrival] = deque(maxlen=2**16)

    def exchange(self) -> list[Event]:
        """Exchange what is due after a step of the learners that are active; return the events."""
        with torch.no_grad():
            events = self._complete(self._order.compute())
        ready = set(self._order.ready)
        for row, pace in enumerate(self._paces):
            pace.due = None if row in ready else SERVER
        return events

    def arrivals(self) -> Iterator[Arrival]:
        """Yield the updates of the centre since the last call, oldest first."""
        while self._arrivals:
            yield self._arrivals.popleft()

    # -- one learner after the other ------------------------------------------------------------------------------

    def _complete(self, completions: Iterable[Completion]) -> list[Event]:
        """Let learners exchange what is due at the end of their steps."""
        events = []
        self._replica.refresh()
        for row, self._time in completions:
            push, fetch = self._due(row)
            if push or fetch:
                events.append(self._exchange_of(row, push, fetch))
        return events

    def _pull_together(self, row: int, elasticity: float) -> None:
        self._fetched_version[row] = self._version
        differences = [(x - c).mul_(elasticity) for x, c in zip(self._of(row), self._centre, strict=True)]
        self._apply(row, differences)
        for x, difference in zip(self._of(row), differences, strict=True):
            x.sub_(difference)

    def _count(self, row: int) -> None:
        for x, counted, update in zip(self._of(row), self._counted, self._updates, strict=True):
            update[row].add_(x - counted[row])
            counted[row].copy_(x)

    def _push(self, row: int) -> None:
        self._apply(row, [update[row] for update in self._updates])
        for update in self._updates:
            update[row].zero_()

    def _apply(self, row: int, update: Sequence[Tensor]) -> None:
        """Add an update to the centre, and note its arrival."""
        for centre, part in zip(self._centre, update, strict=True):
            centre.add_(part)
        self._arrivals.append(Arrival(row, self._time, self._version - self._fetched_version[row]))
        self._version += 1

    def _fetch(self, row: int) -> None:
        self._fetched_version[row] = self._version
        for x, centre in zip(self._of(row), self._centre, strict=True):
            x.copy_(centre)
        for counted, centre in zip(self._counted, self._centre, strict=False):  # EAMSGD counts nothing
            counted[row].copy_(centre)

    # -- all learners ---------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Do nothing: the centre applies updates at once."""

    def reset_centre(self) -> None:
        """Make the first learner's parameters the centre."""
        for array, centre in zip(self._parameters.arrays, self._centre, strict=True):
            centre.copy_(array[0])
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):
            counted.copy_(array)

    def show_centre(self) -> None:
        """Replace the parameters of all learners by the centre."""
        for array, centre in zip(self._parameters.arrays, self._centre, strict=True):
            array.copy_(centre)

    def _say_goodbye(self) -> list[Event]:
        events = self._complete(self._order.drain())
        self._push_last_changes()
        return events

    def _finish(self) -> None:
        self.show_centre()
