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
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours, Scope
from hpcavg.distributed.shared_memory import map_shared_memory
from hpcavg.distributed.topology import Topology
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.mpi import MpiEngine, as_real
from hpcavg.engines.neighbours import mix
from hpcavg.engines.pending import CountWell, SteppedMean, Work, finish
from hpcavg.engines.reduction import PIECE_ELEMENTS, Array, add_up, as_array, average, divide, slice_of
from hpcavg.engines.rows import Members, Rows, block_elements, lay_out, rows_of
from hpcavg.errors import InputError

# Pieces between two looks at whether anyone else wants the interpreter.
_PIECES_A_STEP = 8
# Up to here a second barrier costs more than summing everything on every rank.
_SMALL_BYTES = 128 * 1024


class SharedEngine:
    """Means over learners that are all on one node, in memory they share.

    Arrays that `allocate` placed are averaged there; others, and all on other devices, go the way of `MpiEngine`. So do
    means that need more memory, beside the rows or for copies, where a node has none left; ranks agree on it once.

    Parameters
    ----------
    topology : the ranks.
    wire_format : what crosses nodes as; inside a node nothing is rounded.
    is_required : raise `InputError` if a node has no room to share, in `allocate` or later; otherwise warn and go the
        way of `MpiEngine`.
    """

    name = "shared"
    compresses = True

    def __init__(self, topology: Topology, wire_format: WireFormat | None = None, is_required: bool = True) -> None:
        self._topology = topology
        self._wire_format = wire_format
        self._check_nodes()
        self._is_required = is_required
        self.notes: list[str] = []
        self._mpi = MpiEngine(topology)
        self._members: dict[tuple[Scope, bool], Members] = {}
        self._placed: dict[int, Rows] = {}
        self._copies: dict[tuple[int, ...], list[Tensor] | None] = {}
        self._peer_ranks: Sequence[int] | None = None
        self._has_warned = False
        topology.on_shrink(self._forget)

    def _forget(self) -> None:
        """Let go of communicators and memory shared with lost ranks; `allocate` is called anew."""
        for known in (self._members, self._placed, self._copies):
            known.clear()
        self._peer_ranks = None

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

    def allocate(self, array: Tensor) -> Tensor:
        """Return memory of the form of `array` that the other ranks of the node read, too."""
        if array.device.type != "cpu" or array.numel() == 0:
            return array
        is_small = array.numel() * array.element_size() <= _SMALL_BYTES
        placed = self._place([array], num_copies=4 if is_small else 0)
        return array if placed is None else placed[0]

    def _place(self, arrays: Sequence[Tensor], num_copies: int = 0) -> list[Tensor] | None:
        """Return memory of the form of each of `arrays`, as `allocate` does; None if there is no room for all of them.

        num_copies : of each, for small arrays. Collective over all learners.
        """
        peers = self._topology.peers
        num_blocks = peers.Get_size() * (1 + num_copies)
        sizes = [num_blocks * block_elements(array) * array.element_size() for array in arrays]
        memory = self._memory(peers, sum(sizes), GLOBAL)
        if memory is None:
            return None
        own = []
        for array, start in zip(arrays, itertools.accumulate(sizes, initial=0), strict=False):
            blocks = lay_out(memory, start, array, num_blocks)
            sets = [blocks[first : first + peers.Get_size()] for first in range(0, num_blocks, peers.Get_size())]
            rows = Rows(sets[0])
            if num_copies:
                rows.copies = {LOCAL: sets[1:3], GLOBAL: sets[3:]}
            own.append(rows.blocks[peers.Get_rank()])
            self._placed[own[-1].data_ptr()] = rows
        return own

    def _memory(self, node: MPI.Comm, num_bytes: int, scope: Scope) -> mmap.mmap | None:
        """Return memory that the ranks of `node` share. Collective over `scope`.

        Returns None on all ranks of the scope where one of its nodes has no room, and none is required.
        """
        memory, error = None, ""
        try:
            memory = map_shared_memory(node, num_bytes)
        except OSError as raised:
            error = str(raised)
        comm = self._topology.comm(scope)
        error = next(filter(None, comm.allgather(error)), "")
        if not error:
            return memory
        if self._is_required:
            raise InputError("engine", self.name, f"mpi, or give the node more shared memory ({error})")
        if comm.Get_rank() == 0 and not self._has_warned:
            warnings.warn(f"{error}: means take the slower way of engine='mpi'", stacklevel=2)
        self._has_warned = True
        return None

    # -- means ----------------------------------------------------------------------------------------------------

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine`."""
        placed = self._placed.get(rows.data_ptr())
        members = self._members_of(scope, in_background=False)
        is_in_place = out.data_ptr() == rows.data_ptr()
        is_small = placed is not None and self._is_small(placed, members)
        out_of_place = members.num_lanes > 0 if is_small else not is_in_place
        if (
            placed is None
            or members.num_ranks == 1
            or (out_of_place and self._mean_beside(placed, members) is None)  # no room
        ):
            self._mpi.mean(rows, out, scope, num_well)
        elif is_small:
            self._mean_of_small(placed, out, is_in_place, members, num_well)
        elif is_in_place:
            finish(self._replace(placed, members, num_well, exact))
        else:
            mean = self._mean_beside(placed, members)
            assert mean is not None
            finish(self._average(placed, [as_array(mean)], members, num_well, exact))
            out.copy_(mean)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to this rank's row; see `hpcavg.engines.base.Engine`.

        Neighbours on this node read each other's rows where they lie, so a mean in place needs a second array.
        """
        placed, peers = self._placed.get(rows.data_ptr()), self._topology.peers
        if placed is None or peers.Get_size() == 1:
            self._mpi.mix(rows, out, scope)
            return
        if self._peer_ranks is None:
            self._peer_ranks = peers.Get_group().Translate_ranks(None, self._topology.all_ranks.Get_group())
        here = {rank: as_real(block[0]) for rank, block in zip(self._peer_ranks, placed.blocks, strict=True)}
        is_in_place = out.data_ptr() == rows.data_ptr()
        if is_in_place and placed.mixed is None:
            placed.mixed = torch.empty_like(rows)
        mixed = placed.mixed if is_in_place else out
        assert mixed is not None
        peers.Barrier()  # all rows are final
        mix(as_real(rows[0]), as_real(mixed[0]), self._topology.links(scope), here, self._topology.comm(scope))
        peers.Barrier()  # nobody reads the rows any more
        if is_in_place:
            out.copy_(mixed)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> SteppedMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`.

        They are taken in place of copies, which live as the arrays do and are kept for the next time.
        """
        members = self._members_of(scope, in_background=True)
        copies = None if members.num_ranks == 1 else self._copies_of(arrays)
        if copies is None:
            return self._mpi.start(arrays, scope, count_well)
        for copy, rows in zip(copies, arrays, strict=True):
            copy.copy_(rows)
        work = itertools.chain(
            self._replace_all(copies, members, count_well),
            self._topology.completion(self._topology.background_comm(scope, self)),
        )
        return SteppedMean(work, lambda: [copy[0] for copy in copies])

    def _copies_of(self, arrays: Sequence[Tensor]) -> list[Tensor] | None:
        """Return memory for a copy of each of `arrays`; None where they are not all placed, or a node has no room.

        Collective over all learners at the first call.
        """
        if any(rows.data_ptr() not in self._placed for rows in arrays):
            return None
        key = tuple(rows.data_ptr() for rows in arrays)
        if key not in self._copies:
            copies = self._copies[key] = self._place(arrays)
            for copy, rows in zip(copies or (), arrays, strict=False):
                self._placed[copy.data_ptr()].crossing = self._placed[rows.data_ptr()].crossing
        return self._copies[key]

    def _replace_all(
        self,
        copies: Sequence[Tensor],
        members: Members,
        count_well: CountWell | None,
    ) -> Work:
        """Replace the members' `copies` by their means, one after the other; see `start`."""
        num_well = None
        for index, copy in enumerate(copies):
            is_of_complaints = index == 0 and count_well is not None
            yield from self._replace(self._placed[copy.data_ptr()], members, num_well, exact=is_of_complaints)
            if index == 0 and count_well is not None:
                num_well = count_well(copy[0])

    def _mean_beside(self, rows: Rows, members: Members) -> Tensor | None:
        """Return the memory of a mean that does not take the rows' place; None where a node has no room for it.

        Collective over the members at the first call.
        """
        if members.scope not in rows.means:
            memory = self._memory(members.node, rows.num_bytes, members.scope)
            rows.means[members.scope] = None if memory is None else torch.frombuffer(memory, dtype=rows.dtype)
        return rows.means[members.scope]

    def _replace(self, rows: Rows, members: Members, num_well: int | None, exact: bool) -> Work:
        """Replace the members' rows by their mean, straight into all of them while it is in cache."""
        return self._average(rows, rows.of(members.peers), members, num_well, exact)

    def _average(self, rows: Rows, targets: list[Array], members: Members, num_well: int | None, exact: bool) -> Work:
        """Write the mean of the members' rows to all `targets`, which may be the rows. Collective over the members."""
        yield from members.meet()  # all rows are final, and nobody reads the last mean any more
        yield from self._reduce(rows, targets, members, num_well, exact)
        yield from members.meet()  # the mean is complete

    def _reduce(self, rows: Rows, targets: list[Array], members: Members, num_well: int | None, exact: bool) -> Work:
        """Write this rank's slice of the mean of the members' rows to `targets`."""
        own_rows, count = rows.of(members.peers), rows.num_learners(members, num_well)
        start, end = slice_of(rows.numel, members.node.Get_rank(), members.node.Get_size())
        step = _PIECES_A_STEP * PIECE_ELEMENTS
        for first in range(start, end, step):
            average(own_rows, targets, first, min(first + step, end), count)
            yield True

    def _is_small(self, rows: Rows, members: Members) -> bool:
        return bool(rows.copies)

    def _mean_of_small(
        self, placed: Rows, out: Tensor, is_in_place: bool, members: Members, num_well: int | None
    ) -> None:
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
        target = values[0] if is_in_place else as_array(out)
        self._finish_small(placed, copies, target, members, num_well)

    def _finish_small(self, rows: Rows, copies: list[Array], out: Any, members: Members, num_well: int | None) -> None:
        """Write the mean of the members' `copies` to `out`."""
        count = rows.num_learners(members, num_well)
        if isinstance(out, np.ndarray):
            add_up(copies, out)
            divide(out, count)
        else:
            average(copies, [out], 0, rows.numel, count)
