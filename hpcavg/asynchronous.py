"""Downpour and EAMSGD: learners that exchange with server ranks, each alone and whenever it is due.

A server holds one contiguous slice of the parameters, the centre. What travels is one message per learner and server:
the slices of all dtypes, packed.

    FETCH   learner -> server    empty; answered by CENTRE, and counted as the learner's last sight of the centre
    PEEK    learner -> server    the same for an evaluation, which counts for nothing
    PUSH    learner -> server    an update; the server adds it to the centre at once
    SET     learner -> server    the centre, anew; from learner 0, while the others wait
    DONE    learner -> server    empty; no message follows

MPI keeps the messages of one learner to one server in order, and servers take them in order of arrival.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.errors import SickLearnersError
from hpcavg.events import Arrival, Event
from hpcavg.flat import FlatBuffer
from hpcavg.health import fingerprint, is_finite
from hpcavg.optimizer_state import forget
from hpcavg.replica import Replica
from hpcavg.rule import ServerExchange
from hpcavg.schedule import Progress, Scope
from hpcavg.topology import Topology, complete_asleep, wait_asleep, wait_until

_FETCH, _PEEK, _CENTRE, _PUSH, _SET, _DONE = range(1, 7)
_UNIT_BYTES = 8  # messages are counted in these: 16 GiB for a server's slice, since MPI's counts are 32-bit
_POLL_S = 0.0001


class Message:
    """The slices of one server, packed: host memory that MPI sends, and a view of it for every slice."""

    def __init__(self, slices: list[Tensor]) -> None:
        starts, end = [], 0
        for values in slices:
            starts.append(end)
            end += -(-values.numel() * values.element_size() // _UNIT_BYTES) * _UNIT_BYTES
        memory = torch.zeros(end, dtype=torch.uint8)
        self.num_bytes = end
        self.raw = memory.numpy().view(np.float64)
        self.views = [
            memory[start : start + values.numel() * values.element_size()].view(values.dtype)
            for start, values in zip(starts, slices, strict=True)
        ]


def slices_of(arrays: list[Tensor], server: int, num_servers: int) -> list[Tensor]:
    """Return the part of every array of shape (1, numel) that belongs to `server`, as views of shape (part,)."""
    return [
        array[0, array.shape[1] * server // num_servers : array.shape[1] * (server + 1) // num_servers]
        for array in arrays
    ]


class _Link:
    """One learner's side of the exchange with one server.

    Attributes
    ----------
    slices : the server's part of this learner's parameters, as views. centre : the centre as last seen.
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
        answer = self._comm.Irecv(self.centre.raw, source=self._rank, tag=_CENTRE)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=tag)
        return answer

    def add(self, parts: list[Tensor]) -> None:
        """Add `parts` to the update that is to be sent."""
        if self._is_sent:
            complete_asleep(self._sending, _POLL_S)
            self._update.raw[:] = 0
            self._is_sent = False
        for view, part in zip(self._update.views, parts, strict=True):
            view.add_(part.to(view.device))

    def push(self) -> None:
        """Send the update; it is on its way when this returns."""
        self._sending = self._comm.Isend(self._update.raw, dest=self._rank, tag=_PUSH)
        self._is_sent = True

    def set(self, parts: list[Tensor]) -> None:
        """Send `parts` as the centre."""
        message = Message(self.slices)
        for view, part in zip(message.views, parts, strict=True):
            view.copy_(part)
        self._comm.Send(message.raw, dest=self._rank, tag=_SET)

    def progress(self) -> None:
        """Let MPI carry on with an update on its way."""
        self._sending.Test()

    def close(self) -> None:
        """Wait until the last update has been received and say that none follows."""
        complete_asleep(self._sending, _POLL_S)
        self._comm.Send([None, 0, MPI.BYTE], dest=self._rank, tag=_DONE)


class Worker:
    """A learner of an asynchronous algorithm.

    Parameters
    ----------
    exchange : what the learner exchanges and when. replica : its parameters. topology : learners and servers.
    optimizer : forgets its state where the learner was sick: it then takes the centre, and sends nothing.
    non_finite, start : as in `hpcavg.Averager`.

    Attributes
    ----------
    is_finished : the servers have been said goodbye to; nothing can be exchanged any more.
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
        comm = _claim_servers(topology)
        self._links = [
            _Link(comm, topology.num_learners + server, slices_of(parameters.arrays, server, topology.num_servers))
            for server in range(topology.num_servers)
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
        with torch.no_grad():
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
                    self._fetch(_FETCH)
        blocked_s = time.perf_counter() - started
        return Event(
            progress.step,
            Scope.SERVER,
            progress.step - progress.round_step,
            started - self._made,
            blocked_s,
            blocked_s,
            self._num_bytes * (push + fetch),
            sick=(self._topology.rank,) if is_sick else (),
        )

    def _start_over(self, progress: Progress) -> None:
        """Take the centre in place of parameters that are not finite; what has changed them is never sent."""
        if self._non_finite == "stop":
            raise SickLearnersError([self._topology.rank], f"{Scope.SERVER.value} average of step {progress.step}", 1)
        self._fetch(_FETCH)
        forget(self._optimizer)

    def _pull_together(self, elasticity: float) -> None:
        """Pull learner and centre together: e = α (x - c), x -= e, c += e, for the centre c as it was fetched."""
        self._receive(_FETCH)
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
        with self._topology.waiting("answer of the servers", Scope.SERVER):
            for answer in [link.request(tag) for link in self._links]:
                complete_asleep(answer, _POLL_S)

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
        self._receive(_PEEK)

    def reset_centre(self) -> None:
        """Make learner 0's parameters the centre, and count changes from now on. Collective over the learners.

        All hold the same parameters, and the servers have applied all that was sent.
        """
        if self._topology.rank == 0:
            for link in self._links:
                link.set(link.slices)
            self.flush()
        self._topology.carry_out(lambda: wait_asleep(self._topology.world), what="new centre")
        for array, counted in zip(self._parameters.arrays, self._counted, strict=False):  # EAMSGD counts nothing
            counted.copy_(array)

    def look(self) -> None:
        """Replace the parameters by the centre for an evaluation, the same on all learners, which meet here.

        Afterwards the caller puts its own parameters back; what is pending stays pending. Collective over the learners.
        """
        self.flush()
        wait_asleep(self._topology.world)
        counted = [values.clone() for values in self._counted]
        if self._topology.rank == 0:
            self._fetch(_PEEK)
        for array in self._parameters.arrays:
            host = array[0].cpu()
            for chunk in host.view(torch.uint8).split(2**30):
                self._topology.world.Bcast(chunk.numpy(), root=0)
            array[0].copy_(host)
        for values, saved in zip(self._counted, counted, strict=True):
            values.copy_(saved)

    def say_goodbye(self, progress: Progress) -> None:
        """Send what is pending, and the servers that nothing follows. Once."""
        if self.is_finished:
            return
        self.is_finished = True
        with torch.no_grad():
            self._replica.refresh()
            is_pending = self._elasticity is None and progress.step > self._pushed_step
            if is_pending and is_finite(self._parameters.arrays):
                self._count()
                self._push(progress)
            for link in self._links:
                link.close()

    def finish(self) -> None:
        """Take the final centre. Collective over everyone, after all learners have said goodbye; once."""
        if self._has_centre:
            return
        self._has_centre = True
        with torch.no_grad():
            _share_centre([link.centre for link in self._links], self._topology)
            self._replace()
        self._topology.has_busy_servers = False


class Server:
    """A server rank: its slice of the centre, and the loop that serves it.

    Attributes
    ----------
    centre : the slice, packed. version : updates applied so far.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology) -> None:
        self._topology = topology
        self._comm = _claim_servers(topology)
        self._server = topology.rank - topology.num_learners
        slices = slices_of(parameters.arrays, self._server, topology.num_servers)
        self.centre = Message(slices)
        for view, values in zip(self.centre.views, slices, strict=True):
            view.copy_(values)
        self._incoming = Message(slices)
        self.version = 0
        self._fetched_version = [0] * topology.num_learners
        self._parameters = parameters
        self._num_open = topology.num_learners
        self._is_finished = False
        self._made = time.perf_counter()

    def serve(self) -> Iterator[Arrival]:
        """Serve until every learner is done; yield every update after it was applied."""
        status = MPI.Status()
        while self._num_open:
            with self._topology.waiting("call of a learner", Scope.SERVER):
                wait_until(lambda: self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status), _POLL_S)
            learner, tag = status.Get_source(), status.Get_tag()
            if tag == _SET:
                self._comm.Recv(self.centre.raw, source=learner, tag=tag)
                continue
            if tag == _PUSH:
                self._comm.Recv(self._incoming.raw, source=learner, tag=tag)
                staleness = self.version - self._fetched_version[learner]
                for centre, update in zip(self.centre.views, self._incoming.views, strict=True):
                    centre.add_(update)
                self.version += 1
                yield Arrival(learner, time.perf_counter() - self._made, staleness)
                continue
            self._comm.Recv([None, 0, MPI.BYTE], source=learner, tag=tag)
            if tag == _DONE:
                self._num_open -= 1
                continue
            if tag == _FETCH:
                self._fetched_version[learner] = self.version
            self._comm.Send(self.centre.raw, dest=learner, tag=_CENTRE)

    def finish(self) -> None:
        """Share the final centre, so that this rank's model holds it, too. Collective over everyone, once."""
        if self._is_finished:
            return
        self._is_finished = True
        num_servers = self._topology.num_servers
        parts = [slices_of(self._parameters.arrays, server, num_servers) for server in range(num_servers)]
        centres = [self.centre if server == self._server else Message(slices) for server, slices in enumerate(parts)]
        _share_centre(centres, self._topology)
        self._topology.has_busy_servers = False
        with torch.no_grad():
            for slices, centre in zip(parts, centres, strict=True):
                for values, view in zip(slices, centre.views, strict=True):
                    values.copy_(view)


def _claim_servers(topology: Topology) -> MPI.Comm:
    """Return a communicator for the messages of one averager, whose servers are taken. Collective over everyone."""
    topology.has_busy_servers = True
    return topology.own(topology.everyone.Dup())


def _share_centre(centres: list[Message], topology: Topology) -> None:
    """Give everyone every server's slice of the centre."""
    with topology.waiting("end of all learners", Scope.SERVER):
        wait_asleep(topology.everyone)
    for server, centre in enumerate(centres):
        topology.everyone.Bcast(centre.raw, root=topology.num_learners + server)
