"""The servers' side of Downpour and EAMSGD, and the messages.

Each server holds one contiguous slice of the parameters: its slice of the centre. A message packs the slices of all
dtypes.

    FETCH   learner -> server    empty; the server answers with CENTRE, and counts staleness from here
    PEEK    learner -> server    the same for an evaluation; staleness does not count from here
    CENTRE  server -> learner    the centre
    PUSH    learner -> server    an update; the server adds it to the centre at once
    SET     learner -> server    a new centre, from learner 0 while the other learners wait
    DONE    learner -> server    empty; no message follows

MPI keeps the messages of one learner to one server in order. Servers take messages in order of arrival.
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
_UNIT_BYTES = 8  # MPI counts these units in 31 bits: a server's slice is at most 16 GiB
POLL_S = 0.0001


class Message:
    """Host memory for the slices of one server, packed.

    Parameters
    ----------
    slices : tensors of the slices' sizes and dtypes; their values are not copied.

    Attributes
    ----------
    raw : the memory, as MPI sends it.
    views : a view of it for every slice, shape (part,).
    """

    def __init__(self, slices: list[Tensor]) -> None:
        starts, end = [], 0
        for values in slices:
            starts.append(end)
            end += -(-values.numel() * values.element_size() // _UNIT_BYTES) * _UNIT_BYTES
        memory = torch.zeros(end, dtype=torch.uint8)
        self.raw = memory.numpy().view(np.float64)
        self.views = [
            memory[start : start + values.numel() * values.element_size()].view(values.dtype)
            for start, values in zip(starts, slices, strict=True)
        ]


def slices_of(arrays: list[Tensor], server: int, num_servers: int) -> list[Tensor]:
    """Return the parts of `arrays`, each of shape (1, numel), that belong to `server`, as views of shape (part,)."""
    return [
        array[0, array.shape[1] * server // num_servers : array.shape[1] * (server + 1) // num_servers]
        for array in arrays
    ]


class Server:
    """A server rank: holds its slice of the centre and serves it.

    Parameters
    ----------
    parameters : the model's parameters; the centre starts from them.
    topology : learners and servers.

    Attributes
    ----------
    centre : the slice.
    version : number of updates that were applied.
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
        """Serve until every learner has sent DONE; yield every update that was applied."""
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
        """Receive and answer the message that was probed; return the arrival if it is an update."""
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
        """Take the final centre into this rank's model, too. Collective over all ranks. A second call does nothing."""
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
    """Reserve the servers for one averager; return a communicator for its messages. Collective over all ranks."""
    topology.has_busy_servers = True
    return topology.own(topology.all_ranks.Dup())


def share_centre(centres: list[Message], topology: Topology) -> None:
    """Send every server's slice of the centre to all ranks. Collective over all ranks.

    Parameters
    ----------
    centres : a message per server, in the servers' order. Each server has filled its own.
    topology : learners and servers.
    """
    with topology.waiting("end of all learners", SERVER):
        wait_asleep(topology.all_ranks)
        for server, centre in enumerate(centres):
            topology.all_ranks.Bcast(centre.raw, root=topology.num_learner_ranks + server)
