"""The learners' side of Downpour and EAMSGD: each learner exchanges with the servers at steps of its own.

`hpcavg.averaging.server` describes the messages and the servers' side.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.rule import ServerExchange
from hpcavg.algorithms.schedule import Progress
from hpcavg.algorithms.scope import GLOBAL, SERVER
from hpcavg.averaging.events import Event
from hpcavg.averaging.health import fingerprint, is_finite
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.paces import Pace
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.server import (
    CENTRE,
    DONE,
    FETCH,
    PEEK,
    POLL_S,
    PUSH,
    SET,
    Message,
    claim_servers,
    share_centre,
    slices_of,
)
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import complete_asleep, wait_asleep
from hpcavg.errors import SickLearnersError


class _Link:
    """One learner's exchange with one server.

    Parameters
    ----------
    comm : the communicator of the exchange.
    rank : the server's rank in it.
    slices : the server's part of this learner's parameters, as views of shape (part,), one per dtype.

    Attributes
    ----------
    slices : as given.
    centre : the centre as last received.
    num_bytes : bytes of one update.
    """

    def __init__(self, comm: MPI.Comm, rank: int, slices: list[Tensor]) -> None:
        self.slices = slices
        self.centre = Message(slices)
        self._comm = comm
        self._rank = rank
        self._update = Message(slices)
        self._sending = MPI.REQUEST_NULL
        self._is_sent = False
        self.num_bytes = self._update.num_bytes

    def request(self, tag: int) -> MPI.Request:
        """Ask for the centre, with a `FETCH` or `PEEK`. When the returned request completes, it is in `centre`."""
        answer = self._comm.Irecv(self.centre.raw, source=self._rank, tag=CENTRE)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=tag)
        return answer

    def add(self, parts: list[Tensor]) -> None:
        """Add `parts` to the next update."""
        if self._is_sent:
            complete_asleep(self._sending, POLL_S)
            self._update.raw[:] = 0
            self._is_sent = False
        for view, part in zip(self._update.views, parts, strict=True):
            view.add_(part.to(view.device))

    def push(self) -> None:
        """Start to send the update."""
        self._sending = self._comm.Isend(self._update.raw, dest=self._rank, tag=PUSH)
        self._is_sent = True

    def set(self, parts: list[Tensor]) -> None:
        """Send `parts` as the new centre."""
        message = Message(self.slices)
        for view, part in zip(message.views, parts, strict=True):
            view.copy_(part)
        self._comm.Send(message.raw, dest=self._rank, tag=SET)

    def progress(self) -> None:
        """Let MPI make progress with the update that is being sent."""
        self._sending.Test()

    def close(self) -> None:
        """Wait until the last update was received, and tell the server that none follows."""
        complete_asleep(self._sending, POLL_S)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=DONE)


class Worker:
    """A learner of an asynchronous algorithm.

    Parameters
    ----------
    exchange : the rule's exchange.
    replica : holds the parameters.
    topology : learners and servers.
    pace : the learner's.
    optimizer : the local optimizer. If the learner is sick, it takes the centre, sends nothing, and the optimizer's
        state is dropped.
    non_finite : see `hpcavg.AveragingOptions`.
    start : see `hpcavg.AveragingOptions`.

    Attributes
    ----------
    is_finished : whether the learner has sent its last message.
    """

    def __init__(
        self,
        exchange: ServerExchange,
        replica: Replica,
        topology: Topology,
        pace: Pace,
        optimizer: LocalOptimizer,
        non_finite: str,
        start: str,
    ) -> None:
        self._exchange = exchange
        self._pace = pace
        self._optimizer = optimizer
        self._non_finite = non_finite
        self._replica = replica
        self._parameters = parameters = replica.parameters
        self._topology = topology
        comm = claim_servers(topology)
        self._servers = range(topology.num_learner_ranks, topology.num_ranks)
        self._links = [
            _Link(comm, rank, slices_of(parameters.arrays, server, topology.num_servers))
            for server, rank in enumerate(self._servers)
        ]
        self._num_bytes = sum(link.num_bytes for link in self._links)
        self._elasticity = None if exchange.elasticity is None else exchange.elasticity(topology.num_learners)
        # The parameters when their changes were last added to the update. Later changes are not in it yet.
        self._counted = [] if exchange.elasticity else [array.clone() for array in parameters.arrays]
        # The fingerprint of the parameters at the centre's start; None if each learner started from its own.
        self._centre_fingerprint = fingerprint(parameters.arrays) if start == "rank0" else None
        self._pushed_step = 0
        self.is_finished = self._has_centre = False
        self._made = time.perf_counter()

    def has_other_parameters(self) -> bool:
        """Return whether the parameters differ from those that the centre was made from."""
        self._replica.refresh()
        return fingerprint(self._parameters.arrays) != self._centre_fingerprint

    def exchange(self) -> list[Event]:
        """Exchange what is due after a step; return the event, if anything was due.

        Raises
        ------
        SickLearnersError
            On this learner alone, if its parameters are not finite and `non_finite` is ``"stop"``.
        """
        progress = self._pace.progress
        push = progress.step % self._exchange.push_steps == 0
        fetch = progress.step % self._exchange.fetch_steps == 0
        if not push and not fetch:
            for link in self._links:
                link.progress()
            return []
        started = time.perf_counter()
        with torch.no_grad(), self._contact():
            self._replica.refresh()
            is_sick = not is_finite(self._parameters.arrays)
            if is_sick:
                self._start_over(progress)
                push, fetch = False, True
            elif self._elasticity is not None:
                self._pull_together(self._elasticity)
            else:
                self._count()
                if push:
                    self._push(progress)
                if fetch:
                    self._fetch(FETCH)
        blocked_s = time.perf_counter() - started
        event = Event(
            progress.step,
            SERVER,
            progress.step - progress.round_step,
            started - self._made,
            blocked_s,
            blocked_s,
            self._num_bytes * (push + fetch),
            sick=tuple(self._topology.learners) if is_sick else (),
        )
        self._pace.end_round()
        return [event]

    def _contact(self) -> AbstractContextManager[None]:
        """Return a context in which this rank may wait for the servers, to receive and to send."""
        return self._topology.waiting("exchange with the servers", self._servers)

    def _start_over(self, progress: Progress) -> None:
        """Take the centre instead of parameters that are not finite; their changes are never sent."""
        if self._non_finite == "stop":
            raise SickLearnersError([*self._topology.learners], f"{SERVER} average of step {progress.step}", 1)
        self._fetch(FETCH)
        self._optimizer.forget([0])

    def _pull_together(self, elasticity: float) -> None:
        """Pull learner and centre together (EAMSGD): e = α (x - c), x -= e, c += e, for the fetched centre c."""
        self._receive(FETCH)
        for link in self._links:
            differences = [
                (x - c.to(x.device)).mul_(elasticity) for x, c in zip(link.slices, link.centre.views, strict=True)
            ]
            link.add(differences)
            link.push()
            for x, difference in zip(link.slices, differences, strict=True):
                x.sub_(difference)

    def _count(self) -> None:
        """Add the latest changes of the parameters to the next update."""
        changes = [array - counted for array, counted in zip(self._parameters.arrays, self._counted, strict=True)]
        for server, link in enumerate(self._links):
            link.add(slices_of(changes, server, len(self._links)))
        for array, counted in zip(self._parameters.arrays, self._counted, strict=True):
            counted.copy_(array)

    def _push(self, progress: Progress) -> None:
        self._pushed_step = progress.step
        for link in self._links:
            link.push()

    def _receive(self, tag: int) -> None:
        """Receive the centre from every server, with a `FETCH` or `PEEK`."""
        with self._contact():
            for answer in [link.request(tag) for link in self._links]:
                complete_asleep(answer, POLL_S)

    def _fetch(self, tag: int) -> None:
        """Replace the parameters by the current centre, with a `FETCH` or `PEEK`."""
        self._receive(tag)
        self._replace()

    def _replace(self) -> None:
        for link in self._links:
            for x, c in zip(link.slices, link.centre.views, strict=True):
                x.copy_(c)
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def flush(self) -> None:
        """Wait until the servers have applied everything that this learner sent: they answer in order."""
        self._receive(PEEK)

    def reset_centre(self) -> None:
        """Make learner 0's parameters the centre; updates then hold the changes from here on. Collective.

        All learners must hold the same parameters, and the servers must have applied all updates; see `flush`.
        """
        if self._topology.rank == 0:
            with self._contact():
                for link in self._links:
                    link.set(link.slices)
            self.flush()
        self._topology.run_collective(lambda: wait_asleep(self._topology.learner_ranks), what="new centre")
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def show_centre(self) -> None:
        """Replace the parameters by the centre for an evaluation. Collective over the learners: all get the same.

        The caller restores its parameters afterwards. Changes that were not sent yet are kept.
        """
        self.flush()
        counted = [values.clone() for values in self._counted]
        with self._topology.waiting("view of the centre", GLOBAL):
            wait_asleep(self._topology.learner_ranks)
            if self._topology.rank == 0:
                self._fetch(PEEK)
            for array in self._parameters.arrays:
                host = array[0].cpu()
                for chunk in host.view(torch.uint8).split(2**30):
                    self._topology.learner_ranks.Bcast(chunk.numpy(), root=0)
                array[0].copy_(host)
        for values, saved in zip(self._counted, counted, strict=True):
            values.copy_(saved)

    def say_goodbye(self) -> list[Event]:
        """Send the last changes, and tell the servers that no message follows. A second call does nothing.

        Returns no events; see `SimulatedServers`.
        """
        if self.is_finished:
            return []
        self.is_finished = True
        progress = self._pace.progress
        with torch.no_grad(), self._contact():
            self._replica.refresh()
            is_pending = self._elasticity is None and progress.step > self._pushed_step
            if is_pending and is_finite(self._parameters.arrays):
                self._count()
                self._push(progress)
            for link in self._links:
                link.close()
        return []

    def finish(self) -> None:
        """Take the final centre. Collective over all ranks, after `say_goodbye`. A second call does nothing."""
        if self._has_centre:
            return
        self._has_centre = True
        with torch.no_grad():
            share_centre([link.centre for link in self._links], self._topology)
            self._replace()
        self._topology.has_busy_servers = False
