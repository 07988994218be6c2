"""Sums across nodes at the speed of the wire: chunks on their way to the node that sums them, and back, all at once.

Chunk c of an array belongs to rank c mod N of the N that meet here, one of each node. The others send it theirs, it
sums in the order of the nodes, and sends the mean to all. Every rank thus sends and receives 2 (N - 1)/N of the array,
the least there is, both ways at once; with several chunks on the way the wire is never idle, and what memory has to do
is done meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.mean.pending import Work, all_done

# Large enough for the wire's full speed, small enough that the first and the last, which travel alone, cost little.
_CHUNK_BYTES = 256 * 1024
_MIN_CHUNK_BYTES = 4 * 1024
_CHUNKS_ON_THE_WAY = 8
# What all chunks on the way may take on a rank: with many nodes they become smaller.
_BUFFER_BYTES = 16 * 2**20
# The smallest upper bound of tags that MPI allows; chunks on the way are far fewer.
_NUM_TAGS = 32768

# (first, last but one, sum of this node's rows to be written) and (first, last but one, mean over all)
Read = Callable[[int, int, Tensor], None]
Write = Callable[[int, int, Tensor], None]


class Wire:
    """The ranks that meet across nodes, and the memory of the chunks on the way.

    lane : the communicator, one rank of each node in the order of the nodes.
    """

    def __init__(self, lane: MPI.Comm) -> None:
        self._lane = lane
        self._buffers: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def mean(self, start: int, end: int, dtype: torch.dtype, count: int, read: Read, write: Write) -> Work:
        """Sum ``[start:end]`` over all nodes, divide by `count`, and hand the mean to `write` chunk by chunk.

        dtype : what is summed and sent. read : writes this node's sum of a chunk. Collective over the lane.
        """
        size = self._chunk_elements(end - start, dtype)
        buffers = self._buffers_of(size, dtype)
        chunks = (
            self._chunk(index, first, min(first + size, end), count, buffers, read, write)
            for index, first in enumerate(range(start, end, size))
        )
        yield from together(chunks, _CHUNKS_ON_THE_WAY)

    def _chunk_elements(self, numel: int, dtype: torch.dtype) -> int:
        num_nodes = self._lane.Get_size()
        per_chunk = min(_CHUNK_BYTES, _BUFFER_BYTES // (_CHUNKS_ON_THE_WAY * num_nodes)) // dtype.itemsize
        # Each node should have chunks of its own, also of small arrays.
        return max(min(per_chunk, -(-numel // num_nodes)), _MIN_CHUNK_BYTES // dtype.itemsize)

    def _buffers_of(self, size: int, dtype: torch.dtype) -> list[Tensor]:
        """Return the free buffers, shape (nodes, size)."""
        key = (size, dtype)
        if key not in self._buffers:
            num_nodes = self._lane.Get_size()
            self._buffers = {key: [torch.empty(num_nodes, size, dtype=dtype) for _ in range(_CHUNKS_ON_THE_WAY)]}
        return self._buffers[key]

    def _chunk(
        self, index: int, first: int, end: int, count: int, buffers: list[Tensor], read: Read, write: Write
    ) -> Work:
        lane, buffer = self._lane, buffers.pop()
        rank, num_nodes = lane.Get_rank(), lane.Get_size()
        owner, tag = index % num_nodes, index % _NUM_TAGS
        parts = buffer[:, : end - first]
        others = [node for node in range(num_nodes) if node != rank]
        if rank == owner:
            arriving = [lane.Irecv(_memory(parts[node]), node, tag) for node in others]
            read(first, end, parts[rank])
            yield from all_done(arriving)
            total = sum_of(parts).div_(count)
            leaving = [lane.Isend(_memory(total), node, tag) for node in others]
            write(first, end, total)
            yield from all_done(leaving)
        else:
            arriving = [lane.Irecv(_memory(parts[owner]), owner, tag)]
            read(first, end, parts[rank])
            yield from all_done([*arriving, lane.Isend(_memory(parts[rank]), owner, tag)])
            write(first, end, parts[owner])
        buffers.append(buffer)


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


def sum_of(parts: Tensor) -> Tensor:
    """Return the sum of the rows of `parts`, in their order, in place of the first."""
    total = parts[0]
    for part in parts[1:]:
        total.add_(part)
    return total


def _memory(part: Tensor) -> np.ndarray:
    return part.numpy()
