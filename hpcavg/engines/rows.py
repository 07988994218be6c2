"""Arrays in memory that the ranks of a node share, and these ranks."""

from __future__ import annotations

import itertools
import mmap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import Scope
from hpcavg.engines.compression import Relative
from hpcavg.engines.pending import Work, all_done
from hpcavg.engines.reduction import ALIGNMENT_ELEMENTS, Array, as_array
from hpcavg.engines.wire import Wire


@dataclass(frozen=True)
class Members:
    """The ranks of a scope, as this rank sees them.

    Attributes
    ----------
    scope : the scope.
    node : communicator of the ranks on this node.
    peers : indices of these ranks in ``topology.peers``; they are the indices of their rows in `Rows.blocks`.
    num_ranks : number of ranks on all nodes.
    num_lanes : number of ranks of each node that may communicate with other nodes, each in its own lane; 0 if all ranks
        are on one node.
    is_alone : whether every rank is alone on its node.
    wire : this rank's lane; None if it has none.
    in_background : they take delayed means.
    """

    scope: Scope
    node: MPI.Comm
    peers: tuple[int, ...]
    num_ranks: int
    num_lanes: int = 0
    is_alone: bool = False
    wire: Wire | None = None
    in_background: bool = False

    def meet(self, is_asleep: bool) -> Work:
        """Wait for all of these ranks on this node.

        Parameters
        ----------
        is_asleep : wait in steps, which may sleep, instead of in a blocking barrier.
        """
        if len(self.peers) == 1:
            return
        if is_asleep:
            yield from all_done([self.node.Ibarrier()])
        else:
            self.node.Barrier()


@dataclass
class Rows:
    """One array of every rank of the node, in shared memory.

    Attributes
    ----------
    blocks : the values of every rank's learners, shape (learners, numel).
    means : memory for the mean if it does not replace the rows, by scope; None if a node has no room for it.
    copies : two sets of blocks for copies of small arrays, by scope; empty for large arrays.
    turns : the index of the set for the next mean of copies, by scope.
    codes : the state of compression after the last mean, by scope, and start and end of this rank's slice.
    mixed : memory for the mean of neighbours, until all ranks have read the rows.
    """

    blocks: list[Tensor]
    means: dict[Scope, Tensor | None] = field(default_factory=dict)
    copies: dict[Scope, Sequence[list[Tensor]]] = field(default_factory=dict)
    turns: dict[Scope, Iterator[int]] = field(default_factory=lambda: defaultdict(lambda: itertools.cycle((0, 1))))
    codes: dict[tuple[Scope, int, int], Relative] = field(default_factory=dict)
    mixed: Tensor | None = None
    _rows_of: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)

    @cached_property
    def learners(self) -> int:
        """Number of rows of a block."""
        return self.blocks[0].shape[0]

    @cached_property
    def numel(self) -> int:
        """Number of elements of a row."""
        return self.blocks[0].shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of all rows."""
        return self.blocks[0].dtype

    @cached_property
    def can_allreduce(self) -> bool:
        """Whether MPI can sum a row as it is: its dtype is not a half precision."""
        return not isinstance(as_array(self.blocks[0]), Tensor)

    @cached_property
    def num_bytes(self) -> int:
        """Size of a row, in bytes."""
        return self.numel * self.dtype.itemsize

    def first(self, num_bytes: int) -> Rows:
        """Return the first so many bytes of all rows."""
        return Rows([block[:, : num_bytes // self.dtype.itemsize] for block in self.blocks])

    def num_learners(self, members: Members, num_well: int | None) -> int:
        """Return the number of learners that a mean includes; see `hpcavg.engines.base.Engine.mean`."""
        return num_well or members.num_ranks * self.learners

    def of(self, peers: tuple[int, ...]) -> list[Array]:
        """Return the rows of all learners of `peers`, in their order."""
        if peers not in self._rows_of:
            self._rows_of[peers] = rows_of(self.blocks, peers)
        return self._rows_of[peers]


def rows_of(blocks: Sequence[Tensor], peers: Sequence[int]) -> list[Array]:
    """Return all rows of the blocks of `peers`, in their order."""
    return [as_array(row) for peer in peers for row in blocks[peer]]


def _stride(array: Tensor) -> int:
    """Return the number of elements between the starts of two rows of `array`: rows start on cache lines."""
    return -(-array.shape[1] // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS


def block_elements(array: Tensor) -> int:
    """Return the number of elements of a block for `array`, shape (learners, numel), with padding."""
    return array.shape[0] * _stride(array)


def lay_out(memory: mmap.mmap, start: int, array: Tensor, num_blocks: int) -> list[Tensor]:
    """Return consecutive tensors in `memory`, with the shape and dtype of `array`.

    Each tensor has its own storage: pickling one does not include the others.

    Parameters
    ----------
    memory : shared memory.
    start : byte at which the first tensor starts.
    array : an array with the wanted shape, (learners, numel), and dtype.
    num_blocks : number of tensors.
    """
    learners, numel = array.shape
    elements = block_elements(array)
    strides = (_stride(array) if learners > 1 else numel, 1)  # one row has the strides of a plain tensor
    return [
        torch.frombuffer(memory, dtype=array.dtype, count=elements, offset=offset).as_strided(
            (learners, numel), strides
        )
        for offset in range(
            start, start + num_blocks * elements * array.element_size(), elements * array.element_size()
        )
    ]
