"""Means at two levels: in shared memory inside nodes, by messages between them.

Each rank of a node sums one slice of all rows in shared memory. The ranks of all nodes with the same slice form a lane.
They sum the slice across nodes and write the mean to all rows. Every value crosses between nodes only once each way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import GLOBAL, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.compression import Exact, First, Relative, WireFormat
from hpcavg.engines.crossing import (
    ALLREDUCE,
    CHUNK_BYTES,
    CHUNKS,
    LARGEST_CLASS_BYTES,
    TRIED_BYTES,
    Crossing,
    candidates,
    fastest,
    size_class,
    trial,
)
from hpcavg.engines.pending import Work, finish
from hpcavg.engines.reduction import Array, slice_of, sum_dtype
from hpcavg.engines.rows import Members, Rows
from hpcavg.engines.shared import SharedEngine
from hpcavg.engines.small import AllreduceMean, LaneMean, SmallMean
from hpcavg.engines.wire import Transfer, Wire, largest_chunk_bytes

# During a computation latency does not matter, and every chunk slows the computation: chunks are larger.
_BACKGROUND_CHUNK_BYTES = CHUNK_BYTES[1]
# A mean of a trial takes no longer: on a slow network a part of the array tells which way is the fastest.
_TRIAL_S = 0.1
# Ranks that wait for a shorter mean of their node keep their core.
_QUICK_BYTES = 2**20


class TwoLevelEngine(SharedEngine):
    """Means over learners on any number of nodes, with any number of learners on each.

    The number of lanes is one, or the number of ranks on the smallest node. A trial finds the fastest crossing when an
    array is placed; arrays of one size class share it. The sum is over the ranks of each node in their order, then over
    the nodes: in their order if the crossing is in chunks or there are two nodes, else in the order of MPI_Allreduce,
    which is the same in every run with this crossing.

    Parameters
    ----------
    topology : the ranks.
    wire_format : format of messages between nodes with arrays that are not small; None sends values unchanged.
    is_required : see `SharedEngine`.
    crossing : the way of all arrays; None: by trial.
    """

    name = "twolevel"

    def __init__(
        self,
        topology: Topology,
        wire_format: WireFormat | None = None,
        is_required: bool = True,
        crossing: Crossing | None = None,
    ) -> None:
        super().__init__(topology, wire_format, is_required)
        self._crossing = crossing
        self.crossings: dict[str, Crossing] = {}
        # The fastest crossing in chunks, for delayed means.
        self.delayed_crossings: dict[str, Crossing] = {}

    def _check_nodes(self) -> None:
        """Accept any number of nodes."""

    def _find_members(self, scope: Scope, in_background: bool) -> Members:
        members = super()._find_members(scope, in_background)
        comm, node = self._topology.comm(scope), members.node
        if comm.Get_size() == node.Get_size():
            return members
        index = node.Get_rank()
        sizes = comm.allgather(node.Get_size())
        num_lanes = min(sizes)
        first = node.bcast(comm.Get_rank())
        lane = self._topology.own(comm.Split(index if index < num_lanes else MPI.UNDEFINED, first))
        wire = Wire(lane) if index < num_lanes else None
        return replace(members, wire=wire, num_lanes=num_lanes, is_alone=max(sizes) == 1)

    # -- crossings ------------------------------------------------------------------------------------------------

    def use_crossings(self, crossings: Mapping[str, Crossing]) -> None:
        """Take these ways between nodes, unless all arrays have a given way; see `hpcavg.engines.base.Engine`."""
        if self._crossing is None:
            self.crossings.update(crossings)
            self._small.clear()

    def allocate(self, array: Tensor) -> Tensor:
        """Return shared memory with the shape and dtype of `array`; see `hpcavg.engines.base.Engine`."""
        own = super().allocate(array)
        placed = self._placed.get(own.data_ptr())
        if placed is not None and self._crossing is None and placed.num_bytes > TRIED_BYTES:
            name = size_class(placed.num_bytes, placed.dtype)
            # After a loss of ranks, the result of the first trial is used again.
            if name not in self.delayed_crossings:
                self._try_crossings(name, placed)
        return own

    def _try_crossings(self, name: str, placed: Rows) -> None:
        """Find the fastest crossings of a size class. Collective over all learners.

        The trial overwrites the rows, which have no values yet.
        """
        members = self._members_of(GLOBAL, in_background=False)
        if not members.num_lanes:
            return
        tried = candidates(
            placed.num_bytes,
            members.num_lanes,
            largest_chunk_bytes(self._topology.num_nodes),
            can_allreduce=self._wire_format is None,
        )
        rows = self._rows_of_trial(placed, members, tried[0])
        taken = trial(tried, partial(self._seconds, rows, members))
        self.crossings.setdefault(name, fastest(taken))
        self.delayed_crossings[name] = _for_background(fastest(taken, CHUNKS))
        ways = sorted(taken, key=lambda way: taken[way])
        times = ", ".join(f"{way} {1e3 * taken[way]:.3g} ms" for way in ways)
        self.notes.append(
            f"between nodes, {name}: {self.crossings[name]}; tried with {rows.num_bytes / 1e6:.3g} MB: {times}"
        )

    def _rows_of_trial(self, placed: Rows, members: Members, crossing: Crossing) -> Rows:
        """Return the first part of the rows, whose mean takes a tenth of a second at most. Collective."""
        few = placed.first(TRIED_BYTES)
        seconds = min(self._seconds(few, members, crossing, 1) for _ in range(2))  # the first one warms up
        return placed.first(max(TRIED_BYTES, min(int(few.num_bytes * _TRIAL_S / seconds), LARGEST_CLASS_BYTES)))

    def _seconds(self, rows: Rows, members: Members, crossing: Crossing, repeats: int) -> float:
        """Return the time of so many means of `rows` on the slowest rank. Collective over all learners."""
        self._topology.learner_ranks.Barrier()
        started = time.perf_counter()
        for _ in range(repeats):
            finish(self._average_by(crossing, rows, rows.of(members.peers), members, None, exact=True))
        return max(self._topology.learner_ranks.allgather(time.perf_counter() - started))

    def _crossing_of(self, rows: Rows, members: Members) -> Crossing:
        """Return the way of `rows`; members of a local group may have fewer lanes than all learners."""
        name = size_class(rows.num_bytes, rows.dtype)
        if self._crossing is not None:
            found = self._crossing
        elif members.in_background:
            found = self.delayed_crossings.get(name, Crossing(CHUNKS, members.num_lanes, _BACKGROUND_CHUNK_BYTES))
        else:
            found = self.crossings.get(name, Crossing(ALLREDUCE, members.num_lanes))
        if found.way == ALLREDUCE and (members.in_background or self._wire_format_of(rows) is not None):
            # MPI makes no progress in the background, and cannot sum what is compressed.
            found = Crossing(CHUNKS, found.num_lanes, CHUNK_BYTES[0])
        if members.in_background:
            found = _for_background(found)
        return found if found.num_lanes <= members.num_lanes else replace(found, num_lanes=members.num_lanes)

    # -- means ----------------------------------------------------------------------------------------------------

    def _average(self, rows: Rows, targets: list[Array], members: Members, num_well: int | None, exact: bool) -> Work:
        if not members.num_lanes:
            return super()._average(rows, targets, members, num_well, exact)
        return self._average_by(self._crossing_of(rows, members), rows, targets, members, num_well, exact)

    def _average_by(
        self,
        crossing: Crossing,
        rows: Rows,
        targets: list[Array],
        members: Members,
        num_well: int | None,
        exact: bool,
    ) -> Work:
        """Write the mean of the members' rows, which cross between nodes by `crossing`, to all `targets`."""
        is_asleep = members.in_background or rows.num_bytes > _QUICK_BYTES
        yield from members.meet(is_asleep)  # all rows are final, and no rank reads the last mean any more
        index = members.node.Get_rank()
        if members.wire is not None and index < crossing.num_lanes:
            start, end = slice_of(rows.numel, index, crossing.num_lanes)
            here = rows.of(members.peers)
            code = self._code(rows, members, start, end, is_exact=exact or num_well is not None)
            num_learners = rows.num_learners(members, num_well)
            yield from members.wire.mean(Transfer(start, end, crossing, num_learners, here, targets, code))
            if isinstance(code, First | Relative):
                rows.codes[members.scope, start, end] = code.next
        yield from members.meet(is_asleep)  # the mean is complete

    def _code(self, rows: Rows, members: Members, start: int, end: int, is_exact: bool) -> Exact:
        """Return the code of messages with the slice ``[start:end]``."""
        summed_as = sum_dtype(rows.of(members.peers)[0])
        # Rows of excluded ranks are zero: their differences from the last mean are not small.
        wire_format = self._wire_format_of(rows)
        if wire_format is None or is_exact or summed_as.kind != "f":
            return Exact(summed_as)
        return rows.codes.get((members.scope, start, end)) or First(start, end, summed_as, wire_format)

    def _wire_format_of(self, rows: Rows) -> WireFormat | None:
        """Return the format of messages with `rows`. Small arrays are sent unchanged: compression saves no time."""
        return None if rows.copies else self._wire_format

    def _small_mean(self, rows: Rows, members: Members, replaces: bool) -> SmallMean | None:
        if not members.num_lanes:
            return super()._small_mean(rows, members, replaces)
        crossing = self._crossing_of(rows, members)
        is_one_piece = crossing.piece_elements(rows.numel, rows.dtype.itemsize) == rows.numel
        if crossing.way != ALLREDUCE or not is_one_piece or not rows.can_allreduce:
            return None
        if members.is_alone:
            assert members.wire is not None
            return AllreduceMean(rows.blocks[self._topology.peers.Get_rank()], members.wire.lane)
        # Larger slices are summed piece by piece, in the cache. Memory for a mean is made by all ranks together.
        if rows.num_bytes > _QUICK_BYTES or not replaces:
            return None
        index = members.node.Get_rank()
        lane = members.wire.lane if members.wire is not None and index < crossing.num_lanes else None
        start, end = slice_of(rows.numel, index, crossing.num_lanes) if lane is not None else (0, 0)
        slices = [row[start:end] for row in rows.of(members.peers) if not isinstance(row, Tensor)]
        return LaneMean(slices, members.node, lane)


def _for_background(crossing: Crossing) -> Crossing:
    """Return `crossing` with chunks that are large enough for means in the background."""
    return replace(crossing, piece_bytes=max(crossing.piece_bytes or 0, _BACKGROUND_CHUNK_BYTES))
