"""Downpour and EAMSGD for several learners in one rank, without servers: exchanges in simulated time.

`EventOrder` says which learners compute a step and in which order they complete them. At the end of its step, a learner
exchanges what is due with one centre, at once. The arithmetic is that of `Worker` and `Server`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from hpcavg.algorithms.rule import ServerExchange
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.event_order import Completion, EventOrder
from hpcavg.averaging.events import Arrival, Event
from hpcavg.averaging.health import fingerprint, is_finite
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.paces import Pace
from hpcavg.averaging.replica import Replica
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.errors import SickLearnersError


class SimulatedServers:
    """The learners of a rank and the centre with which they exchange. It has the methods of `Worker`.

    Parameters
    ----------
    exchange : the rule's exchange.
    replica : holds the parameters.
    optimizer : the local optimizer. The state of a sick learner is dropped.
    paces : the learners, one by one. `Pace.due` is ``SERVER`` while a learner does not take the next step.
    options : the averager's options.

    Attributes
    ----------
    is_finished : whether the learners have made their last exchange.
    """

    def __init__(
        self,
        exchange: ServerExchange,
        replica: Replica,
        optimizer: LocalOptimizer,
        paces: Sequence[Pace],
        options: AveragingOptions,
    ) -> None:
        self._exchange = exchange
        self._replica = replica
        self._parameters = replica.parameters
        self._optimizer = optimizer
        self._paces = paces
        self._non_finite = options.non_finite
        self._order = EventOrder(len(paces), options.step_times, options.seed, options.total_steps)
        self._elasticity = None if exchange.elasticity is None else exchange.elasticity(len(paces))
        arrays = self._parameters.arrays
        self._centre = [array[0].clone() for array in arrays]
        # Of Downpour: see `Worker`. Changes that are counted and not pushed yet are in the updates.
        self._counted = [] if exchange.elasticity else [array.clone() for array in arrays]
        self._updates = [torch.zeros_like(array) for array in self._counted]
        self._centre_fingerprint = fingerprint(arrays) if options.start == "rank0" else None
        self._version = 0
        self._fetched_version = [0] * len(paces)
        self._pushed_step = [0] * len(paces)
        self._time = 0.0
        self._arrivals: deque[Arrival] = deque(maxlen=2**16)
        self.is_finished = self._has_centre = False
        self._made = time.perf_counter()

    def has_other_parameters(self) -> bool:
        """Return whether the parameters differ from those that the centre was made from."""
        self._replica.refresh()
        return fingerprint(self._parameters.arrays) != self._centre_fingerprint

    def exchange(self) -> list[Event]:
        """Exchange what is due after a step of the learners that are active; return the events.

        Raises
        ------
        SickLearnersError
            If parameters of a learner are not finite and `AveragingOptions.non_finite` is ``"stop"``.
        """
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
        with torch.no_grad():
            self._replica.refresh()
            for row, self._time in completions:
                step = self._paces[row].progress.step
                push, fetch = step % self._exchange.push_steps == 0, step % self._exchange.fetch_steps == 0
                if push or fetch:
                    events.append(self._exchange_of(row, push, fetch))
        return events

    def _exchange_of(self, row: int, push: bool, fetch: bool) -> Event:
        started = time.perf_counter()
        progress = self._paces[row].progress
        is_sick = not is_finite(self._of(row))
        if is_sick:
            if self._non_finite == "stop":
                raise SickLearnersError([row], f"{SERVER} average of step {progress.step}", 1)
            push, fetch = False, True
            self._fetch(row)
            self._optimizer.forget([row])
        elif self._elasticity is not None:
            self._pull_together(row, self._elasticity)
        else:
            self._count(row)
            if push:
                self._push(row)
            if fetch:
                self._fetch(row)
        period_steps = progress.step - progress.round_step
        self._paces[row].end_round()
        blocked_s = time.perf_counter() - started
        return Event(
            progress.step,
            SERVER,
            period_steps,
            started - self._made,
            blocked_s,
            blocked_s,
            self._parameters.num_bytes * (push + fetch),
            sick=(row,) if is_sick else (),
            row=row,
        )

    def _of(self, row: int) -> list[Tensor]:
        return [array[row] for array in self._parameters.arrays]

    def _pull_together(self, row: int, elasticity: float) -> None:
        """Pull learner and centre together (EAMSGD): e = α (x - c), x -= e, c += e."""
        self._fetched_version[row] = self._version
        differences = [(x - c).mul_(elasticity) for x, c in zip(self._of(row), self._centre, strict=True)]
        self._apply(row, differences)
        for x, difference in zip(self._of(row), differences, strict=True):
            x.sub_(difference)

    def _count(self, row: int) -> None:
        """Add the latest changes of a learner's parameters to its next update."""
        for x, counted, update in zip(self._of(row), self._counted, self._updates, strict=True):
            update[row].add_(x - counted[row])
            counted[row].copy_(x)

    def _push(self, row: int) -> None:
        self._pushed_step[row] = self._paces[row].progress.step
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
        """Do nothing: updates are applied at once."""

    def reset_centre(self) -> None:
        """Make the first learner's parameters the centre; updates then hold the changes from here on."""
        for array, centre in zip(self._parameters.arrays, self._centre, strict=True):
            centre.copy_(array[0])
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):
            counted.copy_(array)

    def show_centre(self) -> None:
        """Replace the parameters of all learners by the centre. The caller restores them afterwards."""
        for array, centre in zip(self._parameters.arrays, self._centre, strict=True):
            array.copy_(centre)

    def say_goodbye(self) -> list[Event]:
        """Complete the steps that are computed and push the last changes; return the events of the former."""
        if self.is_finished:
            return []
        self.is_finished = True
        events = self._complete(self._order.drain())
        with torch.no_grad():
            for row, pace in enumerate(self._paces):
                is_pending = self._elasticity is None and pace.progress.step > self._pushed_step[row]
                if is_pending and is_finite(self._of(row)):
                    self._count(row)
                    self._push(row)
        return events

    def finish(self) -> None:
        """Give all learners the centre, after `say_goodbye`. A second call does nothing."""
        if not self._has_centre:
            self._has_centre = True
            with torch.no_grad():
                self.show_centre()
