"""Means inside a node at the speed of memory: ranks read each other's parameters where they lie.

The flat buffers of a node's ranks lie side by side in memory that all of them map, with room for the means behind.
Every rank averages its slice of all rows, a cache-sized piece at a time, straight into the rows where the mean replaces
them, into a mean beside them where it is merged. No message is sent but the two barriers around it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.mean.mpi import MpiEngine
from hpcavg.mean.pending import Pending
from hpcavg.node_memory import shared_memory
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

# 128 KiB of float32: the pieces of the mean and of a few rows fit a core's cache.
_CHUNK_ELEMENTS = 32 * 1024
# Slices and rows start on multiples of this many elements: no cache line has two writers.
_ALIGNMENT_ELEMENTS = 64


@dataclass(frozen=True)
class _Members:
    """The ranks of a scope: who this one is among them, where their rows are, and which mean they write."""

    comm: MPI.Comm
    index: int
    peers: tuple[int, ...]
    mean_index: int


class SharedEngine:
    """Means over learners that are all on one node, in memory they share.

    Arrays that `home` placed are averaged there; others, and all on other devices, go the way of `MpiEngine`.

    is_required : raise where the node has no room to share; otherwise warn and go the way of `MpiEngine`.
    """

    name = "shared"

    def __init__(self, topology: Topology, is_required: bool = True) -> None:
        if topology.num_nodes > 1:
            raise InputError("engine", self.name, f"mpi or auto: the ranks are on {topology.num_nodes} nodes")
        self._topology = topology
        self._is_required = is_required
        self._mpi = MpiEngine(topology)
        self._members = {Scope.GLOBAL: self._find_members(Scope.GLOBAL, 0)}
        # Groups average at the same time and so need a mean each; the global one is nobody's.
        self._members[Scope.LOCAL] = self._find_members(Scope.LOCAL, 1 + topology.group)
        self._num_means = 1 + topology.num_groups
        self._placed: dict[int, tuple[list[Tensor], list[Tensor]]] = {}

    def _find_members(self, scope: Scope, mean_index: int) -> _Members:
        comm = self._topology.comm(scope)
        peers = tuple(comm.allgather(self._topology.peers.Get_rank()))
        return _Members(comm, comm.Get_rank(), peers, mean_index)

    def home(self, array: Tensor) -> Tensor:
        """Return memory of the form of `array` that the other ranks of the node read, too; see `hpcavg.mean.Engine`."""
        if array.device.type != "cpu" or array.numel() == 0:
            return array
        peers = self._topology.peers
        learners, numel = array.shape
        stride = -(-numel // _ALIGNMENT_ELEMENTS) * _ALIGNMENT_ELEMENTS
        num_rows = peers.Get_size() * learners + self._num_means
        try:
            memory = shared_memory(peers, num_rows * stride * array.element_size())
        except OSError as error:
            if self._is_required:
                raise InputError("engine", self.name, f"mpi, or give the node more shared memory ({error})") from error
            if self._topology.rank == 0:
                warnings.warn(f"{error}: means take the slower way of engine='mpi'", stacklevel=2)
            return array
        memory_of_all = torch.frombuffer(memory, dtype=array.dtype)
        row_stride = stride if learners > 1 else numel  # what a plain tensor of this shape has
        rows = [
            memory_of_all.as_strided((learners, numel), (row_stride, 1), peer * learners * stride)
            for peer in range(peers.Get_size())
        ]
        means = list(memory_of_all.view(num_rows, stride)[-self._num_means :, :numel])
        own = rows[peers.Get_rank()]
        self._placed[own.data_ptr()] = rows, means
        return own

    def mean(self, rows: Tensor, out: Tensor, scope: Scope) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.mean.Engine`."""
        placed = self._placed.get(rows.data_ptr())
        members = self._members[scope]
        if placed is None or len(members.peers) == 1:
            self._mpi.mean(rows, out, scope)
            return
        all_rows, means = placed
        blocks = [all_rows[peer] for peer in members.peers]
        # A mean that takes the rows' place is written into all of them while it is in cache; nothing is copied after.
        in_place = out.data_ptr() == rows.data_ptr()
        targets = [row for block in blocks for row in block] if in_place else [means[members.mean_index]]
        units = -(-rows.shape[1] // _ALIGNMENT_ELEMENTS)
        start, end = (
            units * index // len(blocks) * _ALIGNMENT_ELEMENTS for index in (members.index, members.index + 1)
        )
        members.comm.Barrier()  # all rows are final, and nobody reads the last mean any more
        _average(blocks, targets, start, min(end, rows.shape[1]))
        members.comm.Barrier()  # the mean is complete
        if not in_place:
            out.copy_(targets[0])

    def start(self, arrays: Sequence[Tensor], scope: Scope) -> Pending:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.mean.Engine`."""
        return self._mpi.start(arrays, scope)


def _average(blocks: list[Tensor], targets: list[Tensor], start: int, end: int) -> None:
    """Write the mean of all rows of `blocks`, each of shape (learners, numel), to ``[start:end]`` of all `targets`.

    The order of the sum is that of the rows, whoever takes it. Targets may be the rows.
    """
    learners = [row for block in blocks for row in block]
    if targets[0].dtype in (torch.float16, torch.bfloat16):
        _average_half(learners, targets, start, end)
        return
    # NumPy's calls cost a third of torch's, and pieces that fit the cache make many of them.
    sources, results = ([tensor.numpy() for tensor in tensors] for tensors in (learners, targets))
    count = len(learners)
    # By a power of two a product is exact, and faster; otherwise it would round twice.
    scale, factor = (np.multiply, 1 / count) if count & (count - 1) == 0 else (np.divide, count)
    for first in range(start, end, _CHUNK_ELEMENTS):
        piece = slice(first, min(first + _CHUNK_ELEMENTS, end))
        total = results[0][piece]
        np.add(sources[0][piece], sources[1][piece], out=total)
        for source in sources[2:]:
            np.add(total, source[piece], out=total)
        scale(total, total.dtype.type(factor), out=total)
        for result in results[1:]:
            np.copyto(result[piece], total)


def _average_half(learners: list[Tensor], targets: list[Tensor], start: int, end: int) -> None:
    """Do the same for half precision, summed in float32."""
    scratch = torch.empty(_CHUNK_ELEMENTS, dtype=torch.float32)
    for first in range(start, end, _CHUNK_ELEMENTS):
        piece = slice(first, min(first + _CHUNK_ELEMENTS, end))
        total = scratch[: piece.stop - first].copy_(learners[0][piece])
        for row in learners[1:]:
            total.add_(row[piece])
        total.div_(len(learners))
        for target in targets:
            target[piece].copy_(total)
