"""Sums across nodes at the speed of the wire: chunks on their way to the node that sums them, and back, all at once.

Chunk c of an array belongs to rank c mod N of the N that meet here, one of each node. The others send it theirs, it
sums in the order of the nodes, and sends the mean to all. Every rank thus sends and receives 2 (N - 1)/N of the array,
the least there is, both ways at once; with several chunks on the way the wire is never idle, and what memory has to do
is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.mean.arrays import Values, add_up, divide
from hpcavg.mean.compression import Exact
from hpcavg.mean.pending import Work, all_done

# Large enough for the wire's full speed, small enough that the first and the last, which travel alone, cost little.
_CHUNK_BYTES = 256 * 1024
_MIN_CHUNK_BYTES = 4 * 1024
_CHUNKS_ON_THE_WAY = 16
# What all chunks on the way may take on a rank: with many nodes they become smaller.
_BUFFER_BYTES = 16 * 2**20
# The smallest upper bound of tags that MPI allows; chunks on the way are far fewer.
_NUM_TAGS = 32768


@dataclass
class Transfer:
    """A mean across nodes: its part of an array, and where that comes from and goes to.

    start, end : the part. num_learners, num_learners_here : how many there are on all nodes and on this one.
    read : writes this node's sum over ``[first:end]`` to an array. write : takes the mean over ``[first:end]``.
    code : how both are written for the wire.
    """

    start: int
    end: int
    num_learners: int
    num_learners_here: int
    read: Callable[[int, int, Values], None]
    write: Callable[[int, int, Values], None]
    code: Exact


@dataclass
class _Buffers:
    """Memory for one chunk on its way: the sum of every node, as it is added up and as it travels."""

    sums: Values
    coded: Tensor


class Wire:
    """The ranks that meet across nodes, and the memory of the chunks on the way.

    lane : the communicator, one rank of each node in the order of the nodes.
    """

    def __init__(self, lane: MPI.Comm) -> None:
        self._lane = lane
        self._free: tuple[object, list[_Buffers]] = (None, [])

    def mean(self, transfer: Transfer) -> Work:
        """Sum over all nodes, divide, and hand the mean to `write` chunk by chunk. Collective over the lane."""
        start, end = transfer.start, transfer.end
        size = self._chunk_elements(end - start, transfer.code.dtype)
        free = self._free_buffers(size, transfer.code)
        chunks = (
            self._chunk(index, first, min(first + size, end), transfer, free)
            for index, first in enumerate(range(start, end, size))
        )
        yield from together(chunks, len(free))

    def sum_small(self, gathered: Values) -> None:
        """Sum the rows of `gathered`, shape (nodes, numel), of which every rank brings its own, in place of the first.

        One message in place of two, for what takes no time on the wire. Collective over the lane.
        """
        self._lane.Allgather(MPI.IN_PLACE, gathered)
        add_up(list(gathered), gathered[0])

    @property
    def num_nodes(self) -> int:
        """How many nodes meet here."""
        return self._lane.Get_size()

    @property
    def node(self) -> int:
        """The index of this rank's node among them."""
        return self._lane.Get_rank()

    def _chunk_elements(self, numel: int, dtype: np.dtype[Any]) -> int:
        limit_bytes = min(_CHUNK_BYTES, _BUFFER_BYTES // (_CHUNKS_ON_THE_WAY * self.num_nodes))
        # Each node should have chunks of its own, also of small arrays.
        per_node = -(-numel // self.num_nodes)
        return max(min(limit_bytes // dtype.itemsize, per_node), _MIN_CHUNK_BYTES // dtype.itemsize)

    def _free_buffers(self, size: int, code: Exact) -> list[_Buffers]:
        """Return the buffers, kept from the last time if that was alike."""
        form = (size, code.dtype, type(code))
        if self._free[0] != form:
            sums = [np.empty((self.num_nodes, size), dtype=code.dtype) for _ in range(_CHUNKS_ON_THE_WAY)]
            self._free = form, [_Buffers(each, code.buffers(each)) for each in sums]
        return self._free[1]

    def _chunk(self, index: int, first: int, end: int, transfer: Transfer, free: list[_Buffers]) -> Work:
        lane, code, buffers = self._lane, transfer.code, free.pop()
        rank, num_nodes = self.node, self.num_nodes
        owner, tag = index % num_nodes, index % _NUM_TAGS
        sums, coded = list(buffers.sums[:, : end - first]), buffers.coded[:, : end - first]
        travelling = _memory(coded)
        others = [node for node in range(num_nodes) if node != rank]
        senders = others if rank == owner else [owner]
        arriving = [lane.Irecv(travelling[node], node, tag) for node in senders]
        transfer.read(first, end, sums[rank])
        code.relate(first, end, sums[rank], transfer.num_learners_here)
        if rank == owner:
            yield from all_done(arriving)
            for node in others:
                code.decode(coded[node], sums[node])
            add_up(sums, sums[0])
            divide(sums[0], transfer.num_learners)
            code.encode(first, end, sums[0], coded[0])
            leaving = [lane.Isend(travelling[0], node, tag) for node in others]
            code.settle(first, end, coded[0], sums[0])
            transfer.write(first, end, sums[0])
            yield from all_done(leaving)
        else:
            code.encode(first, end, sums[rank], coded[rank])
            yield from all_done([*arriving, lane.Isend(travelling[rank], owner, tag)])
            code.settle(first, end, coded[owner], sums[owner])
            transfer.write(first, end, sums[owner])
        free.append(buffers)


def together(works: Iterator[Work], limit: int) -> Work:
    """Do all of `works`, started in their order, up to `limit` at a time."""
    active: list[Work] = []
    while True:
        while len(active) < limit and (work := next(works, None)) is not None:
            active.append(work)
        if not active:
            return
        unfinished = [work for work in active if next(work, None) is not None]
        yield len(unfinished) < len(active)
        active = unfinished


def _memory(coded: Tensor) -> Values:
    """Return `coded` as MPI takes it: half precision as the integers of its bits."""
    return (coded.view(torch.int16) if coded.itemsize == 2 else coded).numpy()
