"""The learners' side of Downpour and EAMSGD: what a learner exchanges with a centre, and when.

The centre is on servers (`hpcavg.averaging.parameter_server`), or simulated (`hpcavg.averaging.simulated_servers`).
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from hpcavg.algorithms.rule import ServerExchange
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.events import Event
from hpcavg.averaging.health import fingerprint, is_finite
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.paces import Pace
from hpcavg.averaging.replica import Replica
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.errors import SickLearnersError


class Exchanges(ABC):
    """The exchanges of a rank's learners with a centre.

    Parameters
    ----------
    exchange : the rule's exchange.
    replica : holds the parameters.
    optimizer : the local optimizer. The state of a sick learner is dropped.
    paces : the learners, one by one.
    topology : learners and servers.
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
        topology: Topology,
        options: AveragingOptions,
    ) -> None:
        self._exchange = exchange
        self._replica = replica
        self._parameters = replica.parameters
        self._optimizer = optimizer
        self._paces = paces
        self._topology = topology
        self._non_finite = options.non_finite
        self._elasticity = None if exchange.elasticity is None else exchange.elasticity(topology.num_learners)
        arrays = self._parameters.arrays
        # Of Downpour: the parameters when their changes were last added to the update. Later changes are not in it yet.
        self._counted = [] if exchange.elasticity else [array.clone() for array in arrays]
        # The fingerprint of the parameters at the centre's start; None if each learner started from its own.
        self._centre_fingerprint = fingerprint(arrays) if options.start == "rank0" else None
        self._pushed_step = [0] * len(paces)
        self.is_finished = self._has_centre = False
        self._made = time.perf_counter()

    def has_other_parameters(self) -> bool:
        """Return whether the parameters differ from those that the centre was made from."""
        self._replica.refresh()
        return fingerprint(self._parameters.arrays) != self._centre_fingerprint

    @abstractmethod
    def exchange(self) -> list[Event]:
        """Exchange what is due after a step; return the events.

        Raises
        ------
        SickLearnersError
            On this rank alone, if parameters of a learner are not finite and `AveragingOptions.non_finite` is
            ``"stop"``.
        """

    @abstractmethod
    def flush(self) -> None:
        """Wait until the centre holds everything that the learners of this rank have pushed."""

    @abstractmethod
    def reset_centre(self) -> None:
        """Make learner 0's parameters the centre; updates then hold the changes from here on. Collective.

        All learners must hold the same parameters, and all updates must have been applied; see `flush`.
        """

    @abstractmethod
    def show_centre(self) -> None:
        """Replace the parameters by the centre for an evaluation. Collective over the learners: all get the same.

        The caller restores its parameters afterwards. Changes that were not pushed yet are kept.
        """

    def say_goodbye(self) -> list[Event]:
        """Complete what is under way and push the last changes; return the events. A second call does nothing."""
        if self.is_finished:
            return []
        self.is_finished = True
        with torch.no_grad():
            return self._say_goodbye()

    def finish(self) -> None:
        """Take the final centre. Collective over all ranks, after `say_goodbye`. A second call does nothing."""
        if not self._has_centre:
            self._has_centre = True
            with torch.no_grad():
                self._finish()

    # -- one learner's exchange -----------------------------------------------------------------------------------

    def _due(self, row: int) -> tuple[bool, bool]:
        """Return whether a learner is to push and to fetch after its step."""
        step = self._paces[row].progress.step
        return step % self._exchange.push_steps == 0, step % self._exchange.fetch_steps == 0

    def _exchange_of(self, row: int, push: bool, fetch: bool) -> Event:
        """Make a learner's exchange and begin its next round. A sick one takes the centre, and pushes no changes."""
        started = time.perf_counter()
        pace, learner = self._paces[row], self._topology.learners[row]
        progress = pace.progress
        is_sick = not is_finite(self._of(row))
        if is_sick:
            if self._non_finite == "stop":
                raise SickLearnersError([learner], f"{SERVER} average of step {progress.step}", 1)
            push, fetch = False, True
            self._fetch(row)
            self._optimizer.forget([row])
        elif self._elasticity is not None:
            self._pull_together(row, self._elasticity)
        else:
            self._count(row)
            if push:
                self._push_update(row)
            if fetch:
                self._fetch(row)
        blocked_s = time.perf_counter() - started
        event = Event(
            progress.step,
            SERVER,
            progress.step - progress.round_step,
            started - self._made,
            blocked_s,
            blocked_s,
            self._parameters.num_bytes * (push + fetch),
            sick=(learner,) if is_sick else (),
            row=row if len(self._paces) > 1 else None,
        )
        pace.end_round()
        return event

    def _push_last_changes(self) -> None:
        """Push the changes since the last push of learners that are well."""
        for row, pace in enumerate(self._paces):
            is_pending = self._elasticity is None and pace.progress.step > self._pushed_step[row]
            if is_pending and is_finite(self._of(row)):
                self._count(row)
                self._push_update(row)

    def _push_update(self, row: int) -> None:
        self._pushed_step[row] = self._paces[row].progress.step
        self._push(row)

    def _of(self, row: int) -> list[Tensor]:
        """Return a learner's parameters."""
        return [array[row] for array in self._parameters.arrays]

    @abstractmethod
    def _pull_together(self, row: int, elasticity: float) -> None:
        """Pull learner and centre together (EAMSGD): e = α (x - c), x -= e, c += e."""

    @abstractmethod
    def _count(self, row: int) -> None:
        """Add the latest changes of a learner's parameters to its next update."""

    @abstractmethod
    def _push(self, row: int) -> None:
        """Add a learner's update to the centre, and begin the next one."""

    @abstractmethod
    def _fetch(self, row: int) -> None:
        """Replace a learner's parameters by the current centre; its changes then count from there."""

    @abstractmethod
    def _say_goodbye(self) -> list[Event]: ...

    @abstractmethod
    def _finish(self) -> None: ...
