"""Downpour and EAMSGD: learners that exchange with server ranks, each alone and whenever it is due.

What travels, and what the servers do with it, is in `hpcavg.averaging.server`.
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
from hpcavg.averaging.optimizer_state import forget
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
    """One learner's side of the exchange with one server.

    Attributes
    ----------
    slices : the server's part of this learner's parameters, as views.
    centre : the centre as last seen.
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
        """Ask for the centre; it is in `centre` when the request that is returned completes."""
        answer = self._comm.Irecv(self.centre.raw, source=self._rank, tag=CENTRE)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=tag)
        return answer

    def add(self, parts: list[Tensor]) -> None:
        """Add `parts` to the update that is to be sent."""
        if self._is_sent:
            complete_asleep(self._sending, POLL_S)
            self._update.raw[:] = 0
            self._is_sent = False
        for view, part in zip(self._update.views, parts, strict=True):
            view.add_(part.to(view.device))

    def push(self) -> None:
        """Send the update; it is on its way when this returns."""
        self._sending = self._comm.Isend(self._update.raw, dest=self._rank, tag=PUSH)
        self._is_sent = True

    def set(self, parts: list[Tensor]) -> None:
        """Send `parts` as the centre."""
        message = Message(self.slices)
        for view, part in zip(message.views, parts, strict=True):
            view.copy_(part)
        self._comm.Send(message.raw, dest=self._rank, tag=SET)

    def progress(self) -> None:
        """Let MPI carry on with an update on its way."""
        self._sending.Test()

    def close(self) -> None:
        """Wait until the last update has been received and say that none follows."""
        complete_asleep(self._sending, POLL_S)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=DONE)


class Worker:
    """A learner of an asynchronous algorithm.

    Parameters
    ----------
    exchange : what the learner exchanges and when.
    replica : its parameters.
    topology : learners and servers.
    optimizer : loses its state when the learner is sick: the learner then takes the centre, and sends nothing.
    non_finite : as in `hpcavg.Averager`.
    start : as in `hpcavg.Averager`.

    Attributes
    ----------
    is_finished : whether the learner has told the servers that nothing follows.
    """

    def __init__(
        self,
        exchange: ServerExchange,
        replica: Replica,
        topology: Topology,
        optimizer: torch.optim.Optimizer,
        non_finite: str,
        start: str,
    ) -> None:
        self._exchange = exchange
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
        # The parameters when their changes were last counted: what has changed since is the update not yet counted.
        self._counted = [] if exchange.elasticity else [array.clone() for array in parameters.arrays]
        # What the centre was made from; nothing where the learners' own parameters are another.
        self._centre_fingerprint = fingerprint(parameters.arrays) if start == "rank0" else None
        self._pushed_step = 0
        self.is_finished = self._has_centre = False
        self._made = time.perf_counter()

    def has_other_parameters(self) -> bool:
        """Return whether the parameters are not those that the centre was made from."""
        self._replica.refresh()
        return fingerprint(self._parameters.arrays) != self._centre_fingerprint

    def exchange(self, progress: Progress) -> Event | None:
        """Exchange what is due after a step; return what was done, None where nothing was due.

        Raises `SickLearnersError`, here alone, where the parameters are not finite and that is to stop the run.
        """
        push = progress.step % self._exchange.push_steps == 0
        fetch = progress.step % self._exchange.fetch_steps == 0
        if not push and not fetch:
            for link in self._links:
                link.progress()
            return None
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
        return Event(
            progress.step,
            SERVER,
            progress.step - progress.round_step,
            started - self._made,
            blocked_s,
            blocked_s,
            self._num_bytes * (push + fetch),
            sick=tuple(self._topology.learners) if is_sick else (),
        )

    def _contact(self) -> AbstractContextManager[None]:
        """Return a context in which this rank may wait for the servers, also in what it sends: they may not take it."""
        return self._topology.waiting("exchange with the servers", self._servers)

    def _start_over(self, progress: Progress) -> None:
        """Take the centre in place of parameters that are not finite; what has changed them is never sent."""
        if self._non_finite == "stop":
            raise SickLearnersError([*self._topology.learners], f"{SERVER} average of step {progress.step}", 1)
        self._fetch(FETCH)
        forget(self._optimizer)

    def _pull_together(self, elasticity: float) -> None:
        """Pull learner and centre together: e = α (x - c), x -= e, c += e, for the centre c as it was fetched."""
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
        """Add what the parameters changed by since they were last counted to the update that is to be sent."""
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
        """Have the centre in every link."""
        with self._contact():
            for answer in [link.request(tag) for link in self._links]:
                complete_asleep(answer, POLL_S)

    def _fetch(self, tag: int) -> None:
        """Replace the parameters by the centre."""
        self._receive(tag)
        self._replace()

    def _replace(self) -> None:
        for link in self._links:
            for x, c in zip(link.slices, link.centre.views, strict=True):
                x.copy_(c)
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def flush(self) -> None:
        """Wait until the servers have applied all that was sent: they answer in order."""
        self._receive(PEEK)

    def reset_centre(self) -> None:
        """Make learner 0's parameters the centre, and count changes from now on. Collective over the learners.

        All hold the same parameters, and the servers have applied all that was sent.
        """
        if self._topology.rank == 0:
            with self._contact():
                for link in self._links:
                    link.set(link.slices)
            self.flush()
        self._topology.run_collective(lambda: wait_asleep(self._topology.learner_ranks), what="new centre")
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def look(self) -> None:
        """Replace the parameters by the centre for an evaluation, the same on all learners, which meet here.

        Afterwards the caller puts its own parameters back; what is pending stays pending. Collective over the learners.
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

    def say_goodbye(self, progress: Progress) -> None:
        """Send what is pending, and the servers that nothing follows. Once."""
        if self.is_finished:
            return
        self.is_finished = True
        with torch.no_grad(), self._contact():
            self._replica.refresh()
            is_pending = self._elasticity is None and progress.step > self._pushed_step
            if is_pending and is_finite(self._parameters.arrays):
                self._count()
                self._push(progress)
            for link in self._links:
                link.close()

    def finish(self) -> None:
        """Take the final centre. Collective over all ranks, after all learners have said goodbye; once."""
        if self._has_centre:
            return
        self._has_centre = True
        with torch.no_grad():
            share_centre([link.centre for link in self._links], self._topology)
            self._replace()
        self._topology.has_busy_servers = False
