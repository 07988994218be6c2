"""Means across nodes: by MPI_Allreduce, or in chunks, of which many are in flight at once.

A lane has N ranks, one of each node. They sum one slice of the array.

By MPI_Allreduce, a rank sums the rows of its node in a piece of memory that the mean goes to, anyway.

In chunks, chunk c belongs to rank c mod N. The other ranks send their chunk c to this owner. The owner sums in the
order of the nodes and sends the mean to all. Every rank sends and receives 2 (N - 1)/N of the slice, which is the
minimum. With several chunks in flight, the network is always busy in both directions, and the sums in memory overlap
with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.engines.compression import Exact
from hpcavg.engines.crossing import ALLREDUCE, Crossing
from hpcavg.engines.pending import Work
from hpcavg.engines.reduction import Array, Values, add_up, divide, gather, put, spread

_MIN_CHUNK_BYTES = 4 * 1024
_MAX_ACTIVE_CHUNKS = 16
# Maximum memory of all active chunks on a rank: with many nodes, chunks are smaller.
_BUFFER_BYTES = 16 * 2**20
# MPI guarantees this number of tags, far more than the number of active chunks.
_NUM_TAGS = 32768

Chunk: TypeAlias = Iterator[list[MPI.Request]]
"""A chunk in steps: yields the requests that must complete before the next step."""


@dataclass
class Transfer:
    """A mean across nodes of one slice of an array.

    Attributes
    ----------
    start : start of the slice.
    end : end of the slice.
    crossing : the way of the slice.
    num_learners : number of learners on all nodes.
    rows : the rows of this node, each of shape (numel,).
    targets : what the mean is written to, each of shape (numel,). They may be the rows.
    code : converts sums and means to and from messages, in chunks.
    """

    start: int
    end: int
    crossing: Crossing
    num_learners: int
    rows: list[Array]
    targets: list[Array]
    code: Exact

    def read(self, first: int, end: int, total: Values) -> None:
        """Write this node's sum of the elements ``[first:end]`` to `total`."""
        add_up([row[first:end] for row in self.rows], total)

    def write(self, first: int, end: int, mean: Values) -> None:
        """Write the mean of the elements ``[first:end]`` to all targets."""
        for target in self.targets:
            put(mean, target[first:end])


@dataclass
class _Buffers:
    """Memory for one chunk, with a row for every node.

    Chunks reuse it with all its views: making new views would take longer than summing the chunk.

    Attributes
    ----------
    sums : the sums of the nodes.
    coded : the messages, as tensors.
    messages : the same memory, for MPI.
    """

    sums: list[Values]
    coded: list[Tensor]
    messages: list[Values]

    def cut(self, numel: int) -> _Buffers:
        """Return views of the first `numel` elements of all rows."""
        first = slice(numel)
        sums, messages = ([each[first] for each in part] for part in (self.sums, self.messages))
        return _Buffers(sums, [each[first] for each in self.coded], messages)


def largest_chunk_bytes(num_nodes: int) -> int:
    """Return the size of a chunk that the memory for active chunks allows. Each holds the sums of all nodes."""
    return _BUFFER_BYTES // (_MAX_ACTIVE_CHUNKS * num_nodes)


class Wire:
    """A lane between nodes, and the memory of its chunks.

    Parameters
    ----------
    lane : communicator of one rank of each node, in the order of the nodes.

    Attributes
    ----------
    lane : the communicator.
    node : index of this rank's node.
    num_nodes : number of nodes.
    """

    def __init__(self, lane: MPI.Comm) -> None:
        self.lane = lane
        self.node = lane.Get_rank()
        self.num_nodes = lane.Get_size()
        self._others = [node for node in range(self.num_nodes) if node != self.node]
        self._free: tuple[object, list[_Buffers]] = (None, [])

    def mean(self, transfer: Transfer) -> Work:
        """Take the mean over all nodes and write it, in steps. Collective over the lane."""
        yield from (self._by_allreduce if transfer.crossing.way == ALLREDUCE else self._in_chunks)(transfer)

    def _by_allreduce(self, transfer: Transfer) -> Work:
        """Take the mean piece by piece; each step blocks until the other ranks of the lane have come."""
        start, end = transfer.start, transfer.end
        size = transfer.crossing.piece_elements(end - start, transfer.code.dtype.itemsize)
        for first in range(start, end, size):
            last = min(first + size, end)
            total = gather(transfer.rows, transfer.targets, first, last)
            self.lane.Allreduce(MPI.IN_PLACE, total)
            spread(total, transfer.num_learners, transfer.targets, first)
            yield True

    def _in_chunks(self, transfer: Transfer) -> Work:
        """Take the mean in chunks."""
        start, end = transfer.start, transfer.end
        size = self._chunk_elements(end - start, transfer.crossing, transfer.code.dtype)
        free = self._free_buffers(size, transfer.code)
        chunks = (
            self._chunk(index, first, min(first + size, end), transfer, free)
            for index, first in enumerate(range(start, end, size))
        )
        yield from run_chunks(chunks, len(free))

    def _chunk_elements(self, numel: int, crossing: Crossing, dtype: np.dtype[Any]) -> int:
        limit = min(
            crossing.piece_elements(numel, dtype.itemsize), largest_chunk_bytes(self.num_nodes) // dtype.itemsize
        )
        # Each node should own chunks, also of small arrays.
        per_node = -(-numel // self.num_nodes)
        return max(min(limit, per_node), _MIN_CHUNK_BYTES // dtype.itemsize)

    def _free_buffers(self, size: int, code: Exact) -> list[_Buffers]:
        """Return the buffers of all active chunks: those of the last mean if they have the same size and code."""
        form = (size, code.dtype, type(code))
        if self._free[0] != form:
            self._free = form, [self._buffers(size, code) for _ in range(_MAX_ACTIVE_CHUNKS)]
        return self._free[1]

    def _buffers(self, size: int, code: Exact) -> _Buffers:
        sums = np.empty((self.num_nodes, size), dtype=code.dtype)
        coded = code.buffers(sums)
        return _Buffers(list(sums), list(coded), list(_memory(coded)))

    def _chunk(self, index: int, first: int, end: int, transfer: Transfer, free: list[_Buffers]) -> Chunk:
        """Take the mean of one chunk, in steps."""
        lane, code, rank, others = self.lane, transfer.code, self.node, self._others
        owner, tag = index % self.num_nodes, index % _NUM_TAGS
        buffers = free.pop()
        used = buffers if len(buffers.sums[0]) == end - first else buffers.cut(end - first)
        sums, coded, messages = used.sums, used.coded, used.messages
        receives = [lane.Irecv(messages[node], node, tag) for node in (others if rank == owner else [owner])]
        transfer.read(first, end, sums[rank])
        code.relate(first, end, sums[rank], len(transfer.rows))
        if rank == owner:
            yield receives
            for node in others:
                code.decode(coded[node], sums[node])
            add_up(sums, sums[0])
            divide(sums[0], transfer.num_learners)
            code.encode(first, end, sums[0], coded[0])
            sends = [lane.Isend(messages[0], node, tag) for node in others]
            code.settle(first, end, coded[0], sums[0])
            transfer.write(first, end, sums[0])
            yield sends
        else:
            code.encode(first, end, sums[rank], coded[rank])
            yield [*receives, lane.Isend(messages[rank], owner, tag)]
            code.settle(first, end, coded[owner], sums[owner])
            transfer.write(first, end, sums[owner])
        free.append(buffers)


def run_chunks(chunks: Iterator[Chunk], limit: int) -> Work:
    """Complete all chunks, in steps. They start in order, and at most `limit` are active."""
    waiting: list[tuple[Chunk, list[MPI.Request]]] = []
    while True:
        while len(waiting) < limit and (chunk := next(chunks, None)) is not None:
            waiting.append((chunk, next(chunk)))
        if not waiting:
            return
        # One call tests all requests: during a computation, every call waits for the interpreter's lock.
        requests = [request for _, awaited in waiting for request in awaited]
        while not MPI.Request.Testsome(requests):
            yield False
        waiting = [each for each in (_advance(*each) for each in waiting) if each is not None]
        yield True


def _advance(chunk: Chunk, requests: list[MPI.Request]) -> tuple[Chunk, list[MPI.Request]] | None:
    """Advance `chunk` if all its requests are complete. Return chunk and open requests; None at its end."""
    left = [request for request in requests if request != MPI.REQUEST_NULL]
    if left:
        return chunk, left
    following = next(chunk, None)
    return None if following is None else (chunk, following)


def _memory(coded: Tensor) -> Values:
    """Return the memory of `coded` for MPI, which has no half precision: 16-bit integers with the same bits."""
    return (coded.view(torch.int16) if coded.itemsize == 2 else coded).numpy()
