"""Sums across nodes at the speed of the wire: chunks on their way to the node that sums them, and back, all at once.

Chunk c of an array belongs to rank c mod N of the N that meet here, one of each node. The others send it theirs, it
sums in the order of the nodes, and sends the mean to all. Every rank thus sends and receives 2 (N - 1)/N of the array,
the least there is, both ways at once; with several chunks on the way the wire is never idle, and what memory has to do
is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.engines.compression import Exact
from hpcavg.engines.pending import Work
from hpcavg.engines.reduction import Values, add_up, divide

# Small chunks let the wire start soon and end soon; a fast wire has them over before the next is made up. Just below
# 64 KiB: from there on MPI over TCP asks before it sends, and the answer waits behind what travels the other way.
CHUNK_BYTES = tuple(60 * 1024 * 2**exponent for exponent in range(5))
_MIN_CHUNK_BYTES = 4 * 1024
_CHUNKS_ON_THE_WAY = 16
# What all chunks on the way may take on a rank: with many nodes they become smaller.
_BUFFER_BYTES = 16 * 2**20
# The smallest upper bound of tags that MPI allows; chunks on the way are far fewer.
_NUM_TAGS = 32768

# A chunk on its way: yields the requests that must be complete before it goes on.
Chunk: TypeAlias = Iterator[list[MPI.Request]]


@dataclass(frozen=True)
class Crossing:
    """How arrays cross nodes: in how many lanes, a rank of each node in every one of them, and in what chunks."""

    num_lanes: int
    chunk_bytes: int = CHUNK_BYTES[0]


@dataclass
class Transfer:
    """A mean across nodes: its part of an array, and where that comes from and goes to.

    start, end : the part. chunk_bytes : of which so many bytes travel at a time.
    num_learners, num_learners_here : how many there are on all nodes and on this one.
    read : writes this node's sum over ``[first:end]`` to an array. write : takes the mean over ``[first:end]``.
    code : how both are written for the wire.
    """

    start: int
    end: int
    chunk_bytes: int
    num_learners: int
    num_learners_here: int
    read: Callable[[int, int, Values], None]
    write: Callable[[int, int, Values], None]
    code: Exact


@dataclass
class _Buffers:
    """Memory for one chunk on its way: the sum of every node, as it is added up, as it travels, and as MPI takes that.

    Made once, with all the views: making them anew for every chunk would take longer than adding it up.
    """

    sums: list[Values]
    coded: list[Tensor]
    travelling: list[Values]

    def cut(self, numel: int) -> _Buffers:
        """Return the first `numel` elements of all of them."""
        first = slice(numel)
        sums, travelling = ([each[first] for each in part] for part in (self.sums, self.travelling))
        return _Buffers(sums, [each[first] for each in self.coded], travelling)


def largest_chunk_bytes(num_nodes: int) -> int:
    """Return the size that the memory for chunks on the way allows, of which each holds the sums of all nodes."""
    return _BUFFER_BYTES // (_CHUNKS_ON_THE_WAY * num_nodes)


class Wire:
    """The ranks that meet across nodes, and the memory of the chunks on the way.

    Parameters
    ----------
    lane : the communicator, one rank of each node in the order of the nodes.

    Attributes
    ----------
    node : index of this rank's node.
    num_nodes : number of nodes.
    """

    def __init__(self, lane: MPI.Comm) -> None:
        self._lane = lane
        self.node = lane.Get_rank()
        self.num_nodes = lane.Get_size()
        self._others = [node for node in range(self.num_nodes) if node != self.node]
        self._free: tuple[object, list[_Buffers]] = (None, [])

    def mean(self, transfer: Transfer) -> Work:
        """Sum over all nodes, divide, and hand the mean to `write` chunk by chunk. Collective over the lane."""
        start, end = transfer.start, transfer.end
        size = self._chunk_elements(end - start, transfer.chunk_bytes, transfer.code.dtype)
        free = self._free_buffers(size, transfer.code)
        chunks = (
            self._chunk(index, first, min(first + size, end), transfer, free)
            for index, first in enumerate(range(start, end, size))
        )
        yield from together(chunks, len(free))

    def sum_small(self, total: Values) -> None:
        """Sum `total` over all nodes, in place: one message there and none back. Collective over the lane."""
        size = CHUNK_BYTES[0] // total.itemsize
        for part in (total[first : first + size] for first in range(0, len(total), size)):
            gathered = np.empty((self.num_nodes, len(part)), dtype=total.dtype)
            self._lane.Allgather(part, gathered)
            add_up(list(gathered), part)

    def _chunk_elements(self, numel: int, chunk_bytes: int, dtype: np.dtype[Any]) -> int:
        limit_bytes = min(chunk_bytes, largest_chunk_bytes(self.num_nodes))
        # Each node should have chunks of its own, also of small arrays.
        per_node = -(-numel // self.num_nodes)
        return max(min(limit_bytes // dtype.itemsize, per_node), _MIN_CHUNK_BYTES // dtype.itemsize)

    def _free_buffers(self, size: int, code: Exact) -> list[_Buffers]:
        """Return the buffers, kept from the last time if that was alike."""
        form = (size, code.dtype, type(code))
        if self._free[0] != form:
            self._free = form, [self._buffers(size, code) for _ in range(_CHUNKS_ON_THE_WAY)]
        return self._free[1]

    def _buffers(self, size: int, code: Exact) -> _Buffers:
        sums = np.empty((self.num_nodes, size), dtype=code.dtype)
        coded = code.buffers(sums)
        return _Buffers(list(sums), list(coded), list(_memory(coded)))

    def _chunk(self, index: int, first: int, end: int, transfer: Transfer, free: list[_Buffers]) -> Chunk:
        """Take one chunk there and back."""
        lane, code, rank, others = self._lane, transfer.code, self.node, self._others
        owner, tag = index % self.num_nodes, index % _NUM_TAGS
        buffers = free.pop()
        used = buffers if len(buffers.sums[0]) == end - first else buffers.cut(end - first)
        sums, coded, travelling = used.sums, used.coded, used.travelling
        arriving = [lane.Irecv(travelling[node], node, tag) for node in (others if rank == owner else [owner])]
        transfer.read(first, end, sums[rank])
        code.relate(first, end, sums[rank], transfer.num_learners_here)
        if rank == owner:
            yield arriving
            for node in others:
                code.decode(coded[node], sums[node])
            add_up(sums, sums[0])
            divide(sums[0], transfer.num_learners)
            code.encode(first, end, sums[0], coded[0])
            leaving = [lane.Isend(travelling[0], node, tag) for node in others]
            code.settle(first, end, coded[0], sums[0])
            transfer.write(first, end, sums[0])
            yield leaving
        else:
            code.encode(first, end, sums[rank], coded[rank])
            yield [*arriving, lane.Isend(travelling[rank], owner, tag)]
            code.settle(first, end, coded[owner], sums[owner])
            transfer.write(first, end, sums[owner])
        free.append(buffers)


def together(chunks: Iterator[Chunk], limit: int) -> Work:
    """Take all of `chunks` to their end, started in their order, up to `limit` at a time."""
    waiting: list[tuple[Chunk, list[MPI.Request]]] = []
    while True:
        while len(waiting) < limit and (chunk := next(chunks, None)) is not None:
            waiting.append((chunk, next(chunk)))
        if not waiting:
            return
        # One call for all, of a list that stays: beside a computation, a look costs a turn of the interpreter's lock.
        requests = [request for _, awaited in waiting for request in awaited]
        while not MPI.Request.Testsome(requests):
            yield False
        waiting = [each for each in (_advanced(*each) for each in waiting) if each is not None]
        yield True


def _advanced(chunk: Chunk, requests: list[MPI.Request]) -> tuple[Chunk, list[MPI.Request]] | None:
    """Let `chunk` go on where all its requests are complete; return what it waits for then, None at its end."""
    left = [request for request in requests if request != MPI.REQUEST_NULL]
    if left:
        return chunk, left
    following = next(chunk, None)
    return None if following is None else (chunk, following)


def _memory(coded: Tensor) -> Values:
    """Return `coded` as MPI takes it: half precision as the integers of its bits."""
    return (coded.view(torch.int16) if coded.itemsize == 2 else coded).numpy()
