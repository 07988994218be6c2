"""The learners' side of Downpour and EAMSGD: each learner exchanges with the servers at steps of its own.

`hpcavg.averaging.server` describes the messages and the servers' side.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.rule import ServerExchange
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging.events import Event
from hpcavg.averaging.exchanges import Exchanges
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
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import complete_asleep, wait_asleep


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
    """

    def __init__(self, comm: MPI.Comm, rank: int, slices: list[Tensor]) -> None:
        self.slices = slices
        self.centre = Message(slices)
        self._comm = comm
        self._rank = rank
        self._update = Message(slices)
        self._sending = MPI.REQUEST_NULL
        self._is_sent = False

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


class Worker(Exchanges):
    """A learner of an asynchronous algorithm, and its servers.

    Parameters
    ----------
    exchange : the rule's exchange.
    replica : holds the parameters.
    optimizer : the local optimizer. The state of a sick learner is dropped.
    paces : the learner's, alone.
    topology : learners and servers.
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
        comm = claim_servers(topology)
        self._servers = range(topology.num_learner_ranks, topology.num_ranks)
        self._links = [
            _Link(comm, rank, slices_of(self._parameters.arrays, server, topology.num_servers))
            for server, rank in enumerate(self._servers)
        ]

    def exchange(self) -> list[Event]:
        """Exchange what is due after a step; return the event, if anything was due."""
        push, fetch = self._due(0)
        if not push and not fetch:
            for link in self._links:
                link.progress()
            return []
        with torch.no_grad(), self._contact():
            self._replica.refresh()
            return [self._exchange_of(0, push, fetch)]

    def _contact(self) -> AbstractContextManager[None]:
        """Return a context in which this rank may wait for the servers, to receive and to send."""
        return self._topology.waiting("exchange with the servers", self._servers)

    def _pull_together(self, row: int, elasticity: float) -> None:
        self._receive(FETCH)
        for link in self._links:
            differences = [
                (x - c.to(x.device)).mul_(elasticity) for x, c in zip(link.slices, link.centre.views, strict=True)
            ]
            link.add(differences)
            link.push()
            for x, difference in zip(link.slices, differences, strict=True):
                x.sub_(difference)

    def _count(self, row: int) -> None:
        changes = [array - counted for array, counted in zip(self._parameters.arrays, self._counted, strict=True)]
        for server, link in enumerate(self._links):
            link.add(slices_of(changes, server, len(self._links)))
        for array, counted in zip(self._parameters.arrays, self._counted, strict=True):
            counted.copy_(array)

    def _push(self, row: int) -> None:
        for link in self._links:
            link.push()

    def _receive(self, tag: int) -> None:
        """Receive the centre from every server, with a `FETCH` or `PEEK`."""
        with self._contact():
            for answer in [link.request(tag) for link in self._links]:
                complete_asleep(answer, POLL_S)

    def _fetch(self, row: int, tag: int = FETCH) -> None:
        self._receive(tag)
        self._replace()

    def _replace(self) -> None:
        for link in self._links:
            for x, c in zip(link.slices, link.centre.views, strict=True):
                x.copy_(c)
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def flush(self) -> None:
        """Wait until the servers have applied everything that this learner has pushed: they answer in order."""
        self._receive(PEEK)

    def reset_centre(self) -> None:
        """Make learner 0's parameters the centre. Collective over the learners."""
        if self._topology.rank == 0:
            with self._contact():
                for link in self._links:
                    link.set(link.slices)
            self.flush()
        self._topology.run_collective(lambda: wait_asleep(self._topology.learner_ranks), what="new centre")
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def show_centre(self) -> None:
        """Replace the parameters by the centre. Collective over the learners: all get the same."""
        self.flush()
        counted = [values.clone() for values in self._counted]
        with self._topology.waiting("view of the centre", GLOBAL):
            wait_asleep(self._topology.learner_ranks)
            if self._topology.rank == 0:
                self._fetch(0, PEEK)
            for array in self._parameters.arrays:
                host = array[0].cpu()
                for chunk in host.view(torch.uint8).split(2**30):
                    self._topology.learner_ranks.Bcast(chunk.numpy(), root=0)
                array[0].copy_(host)
        for values, saved in zip(self._counted, counted, strict=True):
            values.copy_(saved)

    def _say_goodbye(self) -> list[Event]:
        with self._contact():
            self._replica.refresh()
            self._push_last_changes()
            for link in self._links:
                link.close()
        return []

    def _finish(self) -> None:
        share_centre([link.centre for link in self._links], self._topology)
        self._replace()
        self._topology.has_busy_servers = False
