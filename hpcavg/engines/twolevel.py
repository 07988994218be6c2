"""Means at two levels: in shared memory inside nodes, by messages between them.

Each rank of a node sums one slice of all rows in shared memory. The ranks of all nodes with the same slice form a lane.
They sum the slice across nodes and write the mean to all rows. Every value crosses between nodes only once each way.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import GLOBAL, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.compression import Exact, First, Relative, WireFormat
from hpcavg.engines.pending import Work, finish
from hpcavg.engines.reduction import Array, Values, add_up, as_array, divide, put, slice_of, sum_dtype
from hpcavg.engines.rows import Members, Rows
from hpcavg.engines.shared import SharedEngine
from hpcavg.engines.wire import CHUNK_BYTES, Crossing, Transfer, Wire, largest_chunk_bytes

# Number of chunks per lane in a trial: enough to be in flight together, and less than a second on a slow network.
_TRIAL_CHUNKS = 16
_TRIALS = 3
# If a chunk takes longer, the network limits it, and trials of larger chunks are not worth their time.
_LONG_CHUNK_S = 0.0005
# During a computation latency does not matter, and every chunk slows the computation: chunks are larger.
_BACKGROUND_CHUNK_BYTES = CHUNK_BYTES[2]
# Up to this size, every node sends its sum to all others: this is faster than a second message.
_GATHERED_BYTES = 512 * 1024


class TwoLevelEngine(SharedEngine):
    """Means over learners on any number of nodes, with any number of learners on each.

    The number of lanes is one, or the number of ranks on the smallest node. A trial finds the fastest combination of
    lanes and chunk size. The sum is over the ranks of each node in their order, then over the nodes in their order. It
    does not depend on lanes and chunks.

    Parameters
    ----------
    topology : the ranks.
    wire_format : format of messages between nodes; None sends values unchanged.
    is_required : see `SharedEngine`.
    """

    name = "twolevel"

    def __init__(self, topology: Topology, wire_format: WireFormat | None = None, is_required: bool = True) -> None:
        super().__init__(topology, wire_format, is_required)
        self._crossings: dict[tuple[int, torch.dtype], Crossing | None] = {}

    def _check_nodes(self) -> None:
        """Accept any number of nodes."""

    def _find_members(self, scope: Scope, in_background: bool) -> Members:
        members = super()._find_members(scope, in_background)
        comm, node = self._topology.comm(scope), members.node
        if comm.Get_size() == node.Get_size():
            return members
        index = node.Get_rank()
        num_lanes = min(comm.allgather(node.Get_size()))
        first = node.bcast(comm.Get_rank())
        lane = self._topology.own(comm.Split(index if index < num_lanes else MPI.UNDEFINED, first))
        wire = Wire(lane) if index < num_lanes else None
        return replace(members, wire=wire, num_lanes=num_lanes, is_asleep=True)

    def allocate(self, array: Tensor) -> Tensor:
        """Return shared memory with the shape and dtype of `array`; see `hpcavg.engines.base.Engine`."""
        own = super().allocate(array)
        placed = self._placed.get(own.data_ptr())
        if placed is not None:
            # After a loss of ranks, the result of the first trial is used again.
            key = (placed.numel, placed.dtype)
            if key not in self._crossings:
                self._crossings[key] = self._fastest_crossing(placed)
            placed.crossing = self._crossings[key]
        return own

    def _fastest_crossing(self, placed: Rows) -> Crossing | None:
        """Return the fastest lanes and chunks for these rows, by trial; None if the rows do not need them.

        The trial overwrites the rows, which have no values yet.
        """
        members = self._members_of(GLOBAL, in_background=False)
        if not members.num_lanes or self._is_small(placed, members):
            return None
        largest_bytes = largest_chunk_bytes(self._topology.num_nodes)
        seconds_per_byte: dict[Crossing, float] = {}
        for num_lanes in {members.num_lanes: None, 1: None}:
            for chunk_bytes in [size for size in CHUNK_BYTES if size <= largest_bytes] or [largest_bytes]:
                crossing = Crossing(num_lanes, chunk_bytes)
                taken = seconds_per_byte[crossing] = self._seconds_per_byte(placed, members, crossing)
                if taken * chunk_bytes > _LONG_CHUNK_S:
                    break
        fastest = min(seconds_per_byte, key=lambda crossing: seconds_per_byte[crossing])
        took = ", ".join(
            f"{each.num_lanes} x {each.chunk_bytes // 1024} KiB: {1e-9 / taken:.3g} GB/s"
            for each, taken in seconds_per_byte.items()
        )
        chosen = f"{fastest.num_lanes} x {fastest.chunk_bytes // 1024} KiB"
        self.notes.append(f"lanes between nodes and chunks in them: {chosen}; means were tried with {took}")
        return fastest

    def _seconds_per_byte(self, placed: Rows, members: Members, crossing: Crossing) -> float:
        """Return the time per byte of the fastest of a few means with these lanes and chunks."""
        num_bytes = crossing.chunk_bytes * crossing.num_lanes * _TRIAL_CHUNKS
        numel = min(placed.numel, num_bytes // placed.dtype.itemsize)
        trial = Rows([block[:, :numel] for block in placed.blocks], crossing=crossing)
        seconds = math.inf
        for _ in range(_TRIALS):
            started = time.perf_counter()
            finish(self._replace(trial, members, None, exact=True))
            seconds = min(seconds, max(self._topology.learner_ranks.allgather(time.perf_counter() - started)))
        return seconds / max(1, trial.num_bytes)

    def _reduce(self, rows: Rows, targets: list[Array], members: Members, num_well: int | None, exact: bool) -> Work:
        """Write the mean of this rank's slice to `targets`, summed across nodes in this rank's lane."""
        if not members.num_lanes:
            yield from super()._reduce(rows, targets, members, num_well, exact)
            return
        crossing = rows.crossing or Crossing(members.num_lanes)
        # The trial was over all ranks. A local group may have fewer lanes.
        num_lanes = min(crossing.num_lanes, members.num_lanes)
        index = members.node.Get_rank()
        if members.wire is None or index >= num_lanes:
            return
        here = rows.of(members.peers)
        start, end = slice_of(rows.numel, index, num_lanes)
        summed_as = sum_dtype(here[0])
        code = Exact(summed_as)
        # Rows of excluded ranks are zero: their differences from the last mean are not small.
        if self._wire_format is not None and not exact and num_well is None and summed_as.kind == "f":
            code = rows.codes.get(members.scope) or First(start, end, summed_as, self._wire_format)

        def read(first: int, end: int, total: Values) -> None:
            add_up([row[first:end] for row in here], total)

        def write(first: int, end: int, mean: Values) -> None:
            for target in targets:
                put(mean, target[first:end])

        num_learners = rows.num_learners(members, num_well)
        chunk_bytes = crossing.chunk_bytes
        if members.in_background:
            chunk_bytes = max(chunk_bytes, _BACKGROUND_CHUNK_BYTES)
        transfer = Transfer(start, end, chunk_bytes, num_learners, len(here), read, write, code)
        yield from members.wire.mean(transfer)
        if isinstance(code, First | Relative):
            rows.codes[members.scope] = code.next

    def _is_small(self, rows: Rows, members: Members) -> bool:
        is_gathered = not members.num_lanes or rows.num_bytes * self._topology.num_nodes <= _GATHERED_BYTES
        return is_gathered and super()._is_small(rows, members)

    def _finish_small(self, rows: Rows, copies: list[Array], out: Any, members: Members, num_well: int | None) -> None:
        """Write the mean of the `copies` of all nodes to `out`. One rank of each node computes it."""
        if not members.num_lanes:
            super()._finish_small(rows, copies, out, members, num_well)
            return
        mean_memory = self._out_of_place_mean(rows, members)
        assert mean_memory is not None
        mean = as_array(mean_memory)
        if members.wire is not None and members.node.Get_rank() == 0:
            total = np.empty(rows.numel, dtype=sum_dtype(mean))
            add_up(copies, total)
            members.wire.sum_small(total)
            divide(total, rows.num_learners(members, num_well))
            put(total, mean)
        members.node.Barrier()
        out[...] = mean
