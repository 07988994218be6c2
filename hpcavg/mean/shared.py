"""Means inside a node at the speed of memory: ranks read each other's parameters where they lie.

The flat buffers of a node's ranks lie side by side in memory that all of them map. Every rank averages its slice of all
rows, a cache-sized piece at a time, straight into the rows where the mean replaces them, into a mean beside them where
it is merged. No message is sent but the two barriers around it; small arrays do
with one, each rank then sums all of them for itself.
"""

from __future__ import annotations

import itertools
import mmap
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.mean.arrays import ALIGNMENT_ELEMENTS, PIECE_ELEMENTS, Array, add_up, as_array, average, divide, slice_of
from hpcavg.mean.compression import Relative, WireFormat
from hpcavg.mean.mpi import MpiEngine
from hpcavg.mean.pending import Pending, Work, all_done, finish
from hpcavg.mean.wire import Crossing, Wire
from hpcavg.node_memory import shared_memory
from hpcavg.schedule import Scope
from hpcavg.topology import Topology

# Pieces between two looks at whether anyone else wants the interpreter.
_PIECES_A_STEP = 8
# Up to here a second barrier costs more than summing everything on every rank.
_SMALL_BYTES = 128 * 1024


@dataclass(frozen=True)
class Members:
    """The ranks of a scope, seen from one of them.

    scope : what they are the ranks of. num_ranks : how many there are on all nodes.
    node : those on this node. peers : their indices among the ranks of the node, which are those of their rows.
    in_background : they meet for delayed means. is_asleep : wait for each other asleep, in steps.
    num_lanes : how many ranks of each node may meet those of the others, each in a lane of its own; 0 where all are on
    one node. wire : this rank's lane, if it has one.
    """

    scope: Scope
    node: MPI.Comm
    peers: tuple[int, ...]
    num_ranks: int
    num_lanes: int = 0
    wire: Wire | None = None
    in_background: bool = False
    is_asleep: bool = False

    def meet(self) -> Work:
        """Wait until all on this node are here."""
        if len(self.peers) == 1:
            return
        if self.is_asleep:
            yield from all_done([self.node.Ibarrier()])
        else:
            self.node.Barrier()


@dataclass
class Rows:
    """Where an array of every rank of the node lies.

    blocks : shape (learners, numel), one per rank. means : by scope, the mean where it does not take the rows' place.
    copies : for small arrays and each scope, blocks for two copies, used in turns; else empty. crossing : the
    fastest way between nodes, if it was looked for. codes : by scope, what compression knows of the last mean.
    """

    blocks: list[Tensor]
    means: dict[Scope, Tensor] = field(default_factory=dict)
    copies: dict[Scope, Sequence[list[Tensor]]] = field(default_factory=dict)
    turns: dict[Scope, Iterator[tuple[Any, Any, list[Array]]]] = field(default_factory=dict)
    crossing: Crossing | None = None
    codes: dict[Scope, Relative] = field(default_factory=dict)
    _rows_of: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)

    @property
    def learners(self) -> int:
        """Rows of a block."""
        return self.blocks[0].shape[0]

    @property
    def numel(self) -> int:
        """Elements of a row."""
        return self.blocks[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """What all of them are."""
        return self.blocks[0].dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return self.numel * self.dtype.itemsize

    def of(self, peers: tuple[int, ...]) -> list[Array]:
        """Return the rows of `peers` and of all their learners, in their order."""
        if peers not in self._rows_of:
            self._rows_of[peers] = rows_of(self.blocks, peers)
        return self._rows_of[peers]


class SharedEngine:
    """Means over learners that are all on one node, in memory they share.

    Arrays that `home` placed are averaged there; others, and all on other devices, go the way of `MpiEngine`.

    is_required : raise where the node has no room to share; otherwise warn and go the way of `MpiEngine`.
    """

    name = "shared"
    compresses = True

    def __init__(self, topology: Topology, is_required: bool = True) -> None:
        self._topology = topology
        self._check_nodes()
        self._is_required = is_required
        self.notes: list[str] = []
        self._mpi = MpiEngine(topology)
        self._members: dict[tuple[Scope, bool], Members] = {}
        self._placed: dict[int, Rows] = {}
        self._copies: dict[int, Tensor] = {}
        topology.on_renewal(self._forget)

    def _forget(self) -> None:
        """Let go of communicators that ranks were lost from, and of memory shared with them; `home` is called anew."""
        for known in (self._members, self._placed, self._copies):
            known.clear()

    def _check_nodes(self) -> None:
        if self._topology.num_nodes > 1:
            allowed = f"twolevel, mpi or auto: the ranks are on {self._topology.num_nodes} nodes"
            raise InputError("engine", self.name, allowed)

    def _members_of(self, scope: Scope, in_background: bool) -> Members:
        """Return the members of `scope`. Collective over it at the first call."""
        key = (scope, in_background)
        if key not in self._members:
            self._members[key] = self._find_members(scope, in_background)
        return self._members[key]

    def _find_members(self, scope: Scope, in_background: bool) -> Members:
        comm = self._topology.comm(scope)
        node = self._topology.own(self._topology.split_by_node(comm))
        peers = tuple(node.allgather(self._topology.peers.Get_rank()))
        num_ranks = comm.Get_size()
        return Members(scope, node, peers, num_ranks, in_background=in_background, is_asleep=in_background)

    # -- where arrays live ----------------------------------------------------------------------------------------

    def home(self, array: Tensor) -> Tensor:
        """Return memory of the form of `array` that the other ranks of the node read, too; see `hpcavg.mean.Engine`."""
        return self._place(array)

    def _place(self, array: Tensor) -> Tensor:
        if array.device.type != "cpu" or array.numel() == 0:
            return array
        peers = self._topology.peers
        num_peers = peers.Get_size()
        learners, numel = array.shape
        stride = -(-numel // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS
        is_small = learners * numel * array.element_size() <= _SMALL_BYTES
        num_blocks = num_peers * (1 + (4 if is_small else 0))
        memory = self._memory(num_blocks * learners * stride * array.element_size())
        if memory is None:
            return array
        memory_of_all = torch.frombuffer(memory, dtype=array.dtype)
        row_stride = stride if learners > 1 else numel  # what a plain tensor of this shape has
        blocks = [
            memory_of_all.as_strided((learners, numel), (row_stride, 1), block * learners * stride)
            for block in range(num_blocks)
        ]
        rows = Rows(blocks[:num_peers])
        if is_small:
            copies = [blocks[first : first + num_peers] for first in range(num_peers, num_blocks, num_peers)]
            rows.copies = {Scope.LOCAL: copies[:2], Scope.GLOBAL: copies[2:]}
        own = blocks[peers.Get_rank()]
        self._placed[own.data_ptr()] = rows
        return own

    def _memory(self, num_bytes: int) -> mmap.mmap | None:
        """Return memory shared by the node; None on all ranks where a node has no room and none is required."""
        memory, error = None, ""
        try:
            memory = shared_memory(self._topology.peers, num_bytes)
        except OSError as raised:
            error = str(raised)
        error = next(filter(None, self._topology.world.allgather(error)), "")
        if not error:
            return memory
        if self._is_required:
            raise InputError("engine", self.name, f"mpi, or give the node more shared memory ({error})")
        if self._topology.rank == 0:
            warnings.warn(f"{error}: means take the slower way of engine='mpi'", stacklevel=2)
        return None

    # -- means ----------------------------------------------------------------------------------------------------

    def mean(self, rows: Tensor, out: Tensor, scope: Scope, wire_format: WireFormat | None = None) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.mean.Engine`."""
        placed = self._placed.get(rows.data_ptr())
        members = self._members_of(scope, in_background=False)
        if placed is None or members.num_ranks == 1:
            self._mpi.mean(rows, out, scope)
        elif self._is_small(placed, members):
            self._mean_of_small(placed, rows, out, members)
        elif out.data_ptr() == rows.data_ptr():
            finish(self._replace(placed, members, wire_format))
        else:
            mean = self._mean_beside(placed, members)
            finish(self._average(placed, [as_array(mean)], members, wire_format))
            out.copy_(mean)

    def start(self, arrays: Sequence[Tensor], scope: Scope, wire_format: WireFormat | None = None) -> Pending:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.mean.Engine`.

        They are taken in place of copies, which live as the arrays do and are kept for the next time.
        """
        members = self._members_of(scope, in_background=True)
        if any(rows.data_ptr() not in self._placed for rows in arrays) or members.num_ranks == 1:
            return self._mpi.start(arrays, scope)
        background = self._topology.background_comm(scope)
        copies = [self._copy(rows) for rows in arrays]
        works = [self._replace(self._placed[copy.data_ptr()], members, wire_format) for copy in copies]
        work = itertools.chain(*works, self._topology.completion(background))
        return Pending(work, lambda: [copy[0] for copy in copies])

    def _copy(self, rows: Tensor) -> Tensor:
        """Return a placed copy of `rows`. Collective over the learners of the node at the first call."""
        if rows.data_ptr() not in self._copies:
            copy = self._copies[rows.data_ptr()] = self._place(rows)
            self._placed[copy.data_ptr()].crossing = self._placed[rows.data_ptr()].crossing
        return self._copies[rows.data_ptr()].copy_(rows)

    def _mean_beside(self, rows: Rows, members: Members) -> Tensor:
        """Return the memory of a mean that does not take the rows' place. Collective over the members on the node."""
        if members.scope not in rows.means:
            memory = shared_memory(members.node, rows.num_bytes)
            rows.means[members.scope] = torch.frombuffer(memory, dtype=rows.dtype)
        return rows.means[members.scope]

    def _replace(self, rows: Rows, members: Members, wire_format: WireFormat | None = None) -> Work:
        """Replace the members' rows by their mean, straight into all of them while it is in cache."""
        return self._average(rows, rows.of(members.peers), members, wire_format)

    def _average(self, rows: Rows, targets: list[Array], members: Members, wire_format: WireFormat | None) -> Work:
        """Write the mean of the members' rows to all `targets`, which may be the rows. Collective over the members."""
        yield from members.meet()  # all rows are final, and nobody reads the last mean any more
        yield from self._reduce(rows, targets, members, wire_format)
        yield from members.meet()  # the mean is complete

    def _reduce(self, rows: Rows, targets: list[Array], members: Members, wire_format: WireFormat | None) -> Work:
        """Write this rank's slice of the mean of the members' rows to `targets`."""
        own_rows = rows.of(members.peers)
        start, end = slice_of(rows.numel, members.node.Get_rank(), members.node.Get_size())
        step = _PIECES_A_STEP * PIECE_ELEMENTS
        for first in range(start, end, step):
            average(own_rows, targets, first, min(first + step, end))
            yield True

    def _is_small(self, rows: Rows, members: Members) -> bool:
        return bool(rows.copies)

    def _mean_of_small(self, placed: Rows, rows: Tensor, out: Tensor, members: Members) -> None:
        """Take the mean behind a single barrier: each rank sums all rows, of copies that the next mean leaves alone.

        The copies of the mean after that are written behind its barrier, when everybody has read these.
        """
        if members.scope not in placed.turns:
            own = self._topology.peers.Get_rank()
            values = as_array(placed.blocks[own])
            placed.turns[members.scope] = itertools.cycle(
                (values, as_array(blocks[own]), rows_of(blocks, members.peers))
                for blocks in placed.copies[members.scope]
            )
        values, own_copy, copies = next(placed.turns[members.scope])
        own_copy[...] = values
        members.node.Barrier()
        target = values[0] if out.data_ptr() == rows.data_ptr() else as_array(out)
        self._finish_small(placed, copies, target, members)

    def _finish_small(self, rows: Rows, copies: list[Array], out: Any, members: Members) -> None:
        """Write the mean of the members' `copies` to `out`."""
        if isinstance(out, np.ndarray):
            add_up(copies, out)
            divide(out, len(copies))
        else:
            average(copies, [out], 0, rows.numel)


def rows_of(blocks: Sequence[Tensor], peers: Sequence[int]) -> list[Array]:
    """Return the rows of the blocks of `peers`, in their order."""
    return [as_array(row) for peer in peers for row in blocks[peer]]
