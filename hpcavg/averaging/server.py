"""The servers of Downpour and EAMSGD, and the messages that learners exchange with them.

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

from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.events import Arrival
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.waiting import wait_asleep, wait_until

FETCH, PEEK, CENTRE, PUSH, SET, DONE = range(1, 7)
_UNIT_BYTES = 8  # messages are counted in these: 16 GiB for a server's slice, since MPI's counts are 32-bit
POLL_S = 0.0001


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


class Server:
    """A server rank: its slice of the centre, and the loop that serves it.

    Attributes
    ----------
    centre : the slice, packed.
    version : updates applied so far.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology) -> None:
        self._topology = topology
        self._comm = claim_servers(topology)
        self._server = topology.rank - topology.num_learner_ranks
        slices = slices_of(parameters.arrays, self._server, topology.num_servers)
        self.centre = Message(slices)
        for view, values in zip(self.centre.views, slices, strict=True):
            view.copy_(values)
        self._incoming = Message(slices)
        self.version = 0
        self._fetched_version = [0] * topology.num_learner_ranks
        self._parameters = parameters
        self._open = list(range(topology.num_learner_ranks))
        self._is_finished = False
        self._made = time.perf_counter()

    def serve(self) -> Iterator[Arrival]:
        """Serve until every learner is done; yield every update after it was applied."""
        status = MPI.Status()
        while self._open:
            with self._topology.waiting("service of the learners", tuple(self._open)):
                wait_until(lambda: self._comm.Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG, status), POLL_S)
            learner, tag = status.Get_source(), status.Get_tag()
            with self._topology.waiting("exchange with a learner", (learner,)):
                arrival = self._take(learner, tag)
            if arrival is not None:
                yield arrival

    def _take(self, learner: int, tag: int) -> Arrival | None:
        """Take a message, which has arrived in part at least, and answer it; return the update if it is one."""
        if tag == SET:
            self._comm.Recv(self.centre.raw, source=learner, tag=tag)
            return None
        if tag == PUSH:
            self._comm.Recv(self._incoming.raw, source=learner, tag=tag)
            staleness = self.version - self._fetched_version[learner]
            for centre, update in zip(self.centre.views, self._incoming.views, strict=True):
                centre.add_(update)
            self.version += 1
            return Arrival(learner, time.perf_counter() - self._made, staleness)
        self._comm.Recv([None, 0, MPI.BYTE], source=learner, tag=tag)
        if tag == DONE:
            self._open.remove(learner)
            return None
        if tag == FETCH:
            self._fetched_version[learner] = self.version
        self._comm.Send(self.centre.raw, dest=learner, tag=CENTRE)
        return None

    def finish(self) -> None:
        """Share the final centre, so that this rank's model holds it, too. Collective over all ranks, once."""
        if self._is_finished:
            return
        self._is_finished = True
        num_servers = self._topology.num_servers
        parts = [slices_of(self._parameters.arrays, server, num_servers) for server in range(num_servers)]
        centres = [self.centre if server == self._server else Message(slices) for server, slices in enumerate(parts)]
        share_centre(centres, self._topology)
        self._topology.has_busy_servers = False
        with torch.no_grad():
            for slices, centre in zip(parts, centres, strict=True):
                for values, view in zip(slices, centre.views, strict=True):
                    values.copy_(view)


def claim_servers(topology: Topology) -> MPI.Comm:
    """Return a communicator for the messages of one averager, whose servers are taken. Collective over all ranks."""
    topology.has_busy_servers = True
    return topology.own(topology.all_ranks.Dup())


def share_centre(centres: list[Message], topology: Topology) -> None:
    """Give everyone every server's slice of the centre."""
    with topology.waiting("end of all learners", SERVER):
        wait_asleep(topology.all_ranks)
        for server, centre in enumerate(centres):
            topology.all_ranks.Bcast(centre.raw, root=topology.num_learner_ranks + server)
