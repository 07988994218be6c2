"""Means at two levels: inside nodes in shared memory, and between them only what no node can know by itself.

A node's ranks sum their rows in memory they share, a slice each; the ranks of all nodes with the same slice then meet
on the wire, in a lane of their own, and write what comes out into all rows. Nothing crosses twice.
"""

from __future__ import annotations

import time
from dataclasses import replace

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.mean.pending import Work, finish
from hpcavg.mean.shared import Members, Rows, SharedEngine, slice_of
from hpcavg.mean.wire import Wire
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

# Of an array, as much as tells many lanes from one, and no more than a slow wire takes a second for.
_TRIAL_BYTES = 2 * 2**20
_TRIALS = 3


class TwoLevelEngine(SharedEngine):
    """Means over learners on any number of nodes, with any number of them on each.

    There are as many lanes as the smallest node has ranks, or a single one where a trial shows that to be faster. The
    sum is that of the ranks of each node in their order, then of the nodes in theirs, and so does not depend on it.
    """

    name = "twolevel"

    def __init__(self, topology: Topology, is_required: bool = True) -> None:
        super().__init__(topology, is_required)
        self._wires: dict[MPI.Comm, Wire] = {}

    def _check_nodes(self) -> None:
        """Take any number of nodes."""

    def _find_members(self, scope: Scope, in_background: bool) -> Members:
        members = super()._find_members(scope, in_background)
        comm, node = self._topology.comm(scope), members.node
        if comm.Get_size() == node.Get_size():
            return members
        index = node.Get_rank()
        num_lanes = comm.allreduce(node.Get_size(), MPI.MIN)
        first = node.bcast(comm.Get_rank())
        lane = self._topology.own(comm.Split(index if index < num_lanes else MPI.UNDEFINED, first))
        return replace(members, lane=Wire(lane) if index < num_lanes else None, num_lanes=num_lanes, is_asleep=True)

    def home(self, array: Tensor) -> Tensor:
        """Return memory of the form of `array` that the other ranks of the node read, too; see `hpcavg.mean.Engine`."""
        own = super().home(array)
        placed = self._placed.get(own.data_ptr())
        if placed is not None:
            placed.num_lanes = self._fastest_num_lanes(placed)
        return own

    def _fastest_num_lanes(self, placed: Rows) -> int:
        """Return the number of lanes that takes the least time for a part of the rows, which hold nothing yet."""
        members = self._members_of(Scope.GLOBAL, in_background=False)
        if members.num_lanes < 2:
            return members.num_lanes
        numel = min(placed.blocks[0].shape[1], _TRIAL_BYTES // placed.blocks[0].element_size())
        trial = Rows([block[:, :numel] for block in placed.blocks], [])
        seconds: dict[int, float] = {}
        for trial.num_lanes in (members.num_lanes, 1):
            for _ in range(_TRIALS):
                started = time.perf_counter()
                finish(self._replace(trial, members))
                slowest = self._topology.world.allreduce(time.perf_counter() - started, MPI.MAX)
                seconds[trial.num_lanes] = min(slowest, seconds.get(trial.num_lanes, slowest))
        return min(seconds, key=lambda lanes: seconds[lanes])

    def _reduce(self, rows: Rows, targets: list[Tensor], members: Members) -> Work:
        """Write the mean of this rank's slice to `targets`: all of it that crosses nodes crosses here."""
        if not members.num_lanes:
            yield from super()._reduce(rows, targets, members)
            return
        num_lanes, index = rows.num_lanes or members.num_lanes, members.node.Get_rank()
        if index >= num_lanes:
            return
        assert members.lane is not None
        own_rows = rows.of(members.peers)
        count = members.num_ranks * rows.blocks[0].shape[0]
        start, end = slice_of(own_rows[0].shape[0], index, num_lanes)

        def read(first: int, end: int, total: Tensor) -> None:
            total.copy_(own_rows[0][first:end])
            for row in own_rows[1:]:
                total.add_(row[first:end])

        def write(first: int, end: int, mean: Tensor) -> None:
            for target in targets:
                target[first:end].copy_(mean)

        yield from members.lane.mean(start, end, sum_dtype(own_rows[0].dtype), count, read, write)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what rows of `dtype` are summed in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
