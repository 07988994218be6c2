"""Means inside a node in shared memory.

All ranks of a node map the flat buffers of all of them. Every rank averages one slice of all rows, in pieces that fit
the cache. It writes the mean to the rows if the mean replaces them, else to separate memory. There are no messages, but
a barrier before and after. Small arrays need one barrier: each rank sums all rows itself. The smallest go by
MPI_Allreduce.
"""

from __future__ import annotations

import itertools
import mmap
import warnings
from collections.abc import Sequence

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import GLOBAL, LOCAL, Neighbours, Scope
from hpcavg.distributed.shared_memory import map_shared_memory
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import WithoutCrossings
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.inside import as_real, is_in_place
from hpcavg.engines.mpi import MpiEngine
from hpcavg.engines.neighbours import mix
from hpcavg.engines.pending import CountWell, SteppedMean, Work, finish
from hpcavg.engines.reduction import PIECE_ELEMENTS, Array, as_array, average, slice_of
from hpcavg.engines.rows import Members, Rows, block_elements, lay_out, rows_of
from hpcavg.engines.small import AllreduceMean, CopiesMean, SmallMean
from hpcavg.errors import InputError

# Number of pieces before other threads get the interpreter.
_PIECES_PER_STEP = 8
# Up to this size, a second barrier costs more than a sum of all rows on every rank.
_SMALL_BYTES = 128 * 1024
# Up to this size, MPI's own message takes no longer than a barrier.
_TINY_BYTES = 4 * 1024


class SharedEngine(WithoutCrossings):
    """Means over learners on one node, in shared memory.

    It averages arrays from `allocate`. `MpiEngine` averages all other arrays, and arrays on devices. `MpiEngine` also
    takes means that need memory for copies or for a separate mean, if a node has no room for it.

    Parameters
    ----------
    topology : the ranks.
    wire_format : format of messages between nodes; inside a node nothing is compressed.
    is_required : raise `InputError` if a node has no room, in `allocate` or later. Otherwise warn and use `MpiEngine`.

    Raises
    ------
    InputError
        On every rank, if there are several nodes.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from hpcavg import Topology
    >>> engine = SharedEngine(Topology(MPI.COMM_SELF))
    >>> rows = engine.allocate(torch.zeros(2, 3))
    >>> rows.copy_(torch.tensor([[1.0, 2.0, 3.0], [3.0, 4.0, 5.0]])).mean(dim=0)
    tensor([2., 3., 4.])
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
        self._small: dict[tuple[int, str, bool], tuple[SmallMean, int]] = {}
        self._has_warned = False
        topology.on_shrink(self._forget)

    def _forget(self) -> None:
        """Forget communicators and memory shared with lost ranks; the caller calls `allocate` again."""
        for known in (self._members, self._placed, self._copies, self._small):
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
        return Members(scope, node, peers, num_ranks, in_background=in_background)

    # -- memory of arrays -----------------------------------------------------------------------------------------

    def allocate(self, array: Tensor) -> Tensor:
        """Return shared memory with the shape and dtype of `array`; see `hpcavg.engines.base.Engine`."""
        if array.device.type != "cpu" or array.numel() == 0:
            return array
        is_small = array.numel() * array.element_size() <= _SMALL_BYTES
        placed = self._place([array], num_copies=4 if is_small else 0)
        return array if placed is None else placed[0]

    def _place(self, arrays: Sequence[Tensor], num_copies: int = 0) -> list[Tensor] | None:
        """Return shared memory for each array; None if there is no room for all. Collective over all learners.

        Parameters
        ----------
        arrays : arrays with the wanted shapes, (learners, numel), and dtypes.
        num_copies : number of copies of each array, for means of small arrays.
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

        If one of its nodes has no room, it raises `InputError` or returns None on all ranks; see `is_required`.
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
        key = rows.data_ptr()
        replaces = is_in_place(rows, out)
        small = self._small.get((key, scope.name, replaces))
        if small is not None:
            take, num_learners = small
            take(None if replaces else out, num_well or num_learners)
            return
        placed = self._placed.get(key)
        members = self._members_of(scope, in_background=False)
        if placed is None or members.num_ranks == 1:
            self._mpi.mean(rows, out, scope, num_well)
        elif (take_small := self._small_mean(placed, members, replaces)) is not None:
            self._small[key, scope.name, replaces] = take_small, placed.num_learners(members, None)
            self.mean(rows, out, scope, num_well)
        elif replaces:
            finish(self._replace(placed, members, num_well, exact))
        elif (mean := self._out_of_place_mean(placed, members)) is not None:
            finish(self._average(placed, [as_array(mean)], members, num_well, exact))
            out.copy_(mean)
        else:  # no room
            self._mpi.mean(rows, out, scope, num_well)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of each learner; see `hpcavg.engines.base.Engine`.

        Neighbours on this node read each other's rows in shared memory. A mean in place therefore needs a second array.
        """
        placed, peers = self._placed.get(rows.data_ptr()), self._topology.peers
        if placed is None or peers.Get_size() == 1:
            self._mpi.mix(rows, out, scope)
            return
        here = {
            rank * len(rows) + row: each
            for rank, block in zip(self._topology.peer_ranks, placed.blocks, strict=True)
            for row, each in enumerate(as_real(block))
            if rank != self._topology.rank
        }
        replaces = is_in_place(rows, out)
        if replaces and placed.mixed is None:
            placed.mixed = torch.empty_like(rows)
        mixed = placed.mixed if replaces else out
        assert mixed is not None
        peers.Barrier()  # all rows are final
        mix(as_real(rows), as_real(mixed), self._topology, scope, here)
        peers.Barrier()  # no rank reads the rows any more
        if replaces:
            out.copy_(mixed)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> SteppedMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`.

        Means are taken of copies in shared memory, which are kept for the next call.
        """
        members = self._members_of(scope, in_background=True)
        # Memory is made by all learners together, also by one that is alone in its group.
        copies = None if self._topology.num_learners == 1 else self._copies_of(arrays)
        if copies is None or members.num_ranks == 1:
            return self._mpi.start(arrays, scope, count_well)
        for copy, rows in zip(copies, arrays, strict=True):
            copy.copy_(rows)
        work = itertools.chain(
            self._replace_all(copies, members, count_well),
            self._topology.completion(self._topology.background_comm(scope, self)),
        )
        return SteppedMean(work, lambda: [copy[0] for copy in copies])

    def _copies_of(self, arrays: Sequence[Tensor]) -> list[Tensor] | None:
        """Return shared memory for a copy of each array; None if one is not from `allocate`, or a node has no room.

        The first call is collective over all learners.
        """
        if any(rows.data_ptr() not in self._placed for rows in arrays):
            return None
        key = tuple(rows.data_ptr() for rows in arrays)
        if key not in self._copies:
            self._copies[key] = self._place(arrays)
        return self._copies[key]

    def _replace_all(
        self,
        copies: Sequence[Tensor],
        members: Members,
        count_well: CountWell | None,
    ) -> Work:
        """Replace the first row of all `copies` of the members by the mean, array by array; see `start`."""
        num_well = None
        for index, copy in enumerate(copies):
            is_count = index == 0 and count_well is not None
            placed = self._placed[copy.data_ptr()]
            firsts = placed.of(members.peers)[:: placed.learners]  # nobody reads the mean in other rows
            yield from self._average(placed, firsts, members, num_well, exact=is_count)
            if index == 0 and count_well is not None:
                num_well = count_well(copy[0])

    def _out_of_place_mean(self, rows: Rows, members: Members) -> Tensor | None:
        """Return shared memory for a mean that does not replace the rows; None if a node has no room.

        The first call is collective over the members.
        """
        if members.scope not in rows.means:
            memory = self._memory(members.node, rows.num_bytes, members.scope)
            rows.means[members.scope] = None if memory is None else torch.frombuffer(memory, dtype=rows.dtype)
        return rows.means[members.scope]

    def _replace(self, rows: Rows, members: Members, num_well: int | None, exact: bool) -> Work:
        """Replace the members' rows by their mean. Each piece goes to all rows while it is in the cache."""
        return self._average(rows, rows.of(members.peers), members, num_well, exact)

    def _average(self, rows: Rows, targets: list[Array], members: Members, num_well: int | None, exact: bool) -> Work:
        """Write the mean of the members' rows to all `targets`, which may be the rows. Collective over the members."""
        yield from members.meet(members.in_background)  # all rows are final, and no rank reads the last mean any more
        own_rows, count = rows.of(members.peers), rows.num_learners(members, num_well)
        start, end = slice_of(rows.numel, members.node.Get_rank(), members.node.Get_size())
        step = _PIECES_PER_STEP * PIECE_ELEMENTS
        for first in range(start, end, step):
            average(own_rows, targets, first, min(first + step, end), count)
            yield True
        yield from members.meet(members.in_background)  # the mean is complete

    def _small_mean(self, rows: Rows, members: Members, replaces: bool) -> SmallMean | None:
        """Return the fast way of a small array; None for other arrays."""
        if not rows.copies:
            return None
        index = self._topology.peers.Get_rank()
        own = rows.blocks[index]
        # MPI sums in an order of its own: of several learners in a rank, the sum would depend on who is where.
        if rows.num_bytes <= _TINY_BYTES and rows.can_allreduce and rows.learners == 1:
            return AllreduceMean(own, members.node)
        copies = [(blocks[index], rows_of(blocks, members.peers)) for blocks in rows.copies[members.scope]]
        return CopiesMean(own, copies, rows.turns[members.scope], members.node)
