"""Where arrays lie that the ranks of a node read from each other, and who these ranks are."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import Scope
from hpcavg.engines.compression import Relative
from hpcavg.engines.pending import Work, all_done
from hpcavg.engines.reduction import ALIGNMENT_ELEMENTS, Array, as_array
from hpcavg.engines.wire import Crossing, Wire


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

    blocks : shape (learners, numel), one per rank. means : by scope, the mean where it does not take the rows' place;
    None where a node has no room for it. copies : for small arrays and each scope, blocks for two copies, used in
    turns; else empty. crossing : the fastest way between nodes, if it was looked for. codes : by scope, what
    compression knows of the last mean. mixed : the mean of neighbours until all have read the rows.
    """

    blocks: list[Tensor]
    means: dict[Scope, Tensor | None] = field(default_factory=dict)
    copies: dict[Scope, Sequence[list[Tensor]]] = field(default_factory=dict)
    turns: dict[Scope, Iterator[tuple[Any, Any, list[Array]]]] = field(default_factory=dict)
    crossing: Crossing | None = None
    codes: dict[Scope, Relative] = field(default_factory=dict)
    mixed: Tensor | None = None
    _rows_of: dict[tuple[int, ...], list[Array]] = field(default_factory=dict)

    @cached_property
    def learners(self) -> int:
        """Rows of a block."""
        return self.blocks[0].shape[0]

    @cached_property
    def numel(self) -> int:
        """Elements of a row."""
        return self.blocks[0].shape[1]

    @cached_property
    def dtype(self) -> torch.dtype:
        """What all of them are."""
        return self.blocks[0].dtype

    @cached_property
    def num_bytes(self) -> int:
        """Bytes of a row."""
        return self.numel * self.dtype.itemsize

    def num_learners(self, members: Members, num_well: int | None) -> int:
        """Return how many learners a mean is of; see `hpcavg.engines.base.Engine.mean`."""
        return self.learners * (members.num_ranks if num_well is None else num_well)

    def of(self, peers: tuple[int, ...]) -> list[Array]:
        """Return the rows of `peers` and of all their learners, in their order."""
        if peers not in self._rows_of:
            self._rows_of[peers] = rows_of(self.blocks, peers)
        return self._rows_of[peers]


def rows_of(blocks: Sequence[Tensor], peers: Sequence[int]) -> list[Array]:
    """Return the rows of the blocks of `peers`, in their order."""
    return [as_array(row) for peer in peers for row in blocks[peer]]


def _stride(array: Tensor) -> int:
    """Return the elements from one row of `array` to the next: rows start on cache lines."""
    return -(-array.shape[1] // ALIGNMENT_ELEMENTS) * ALIGNMENT_ELEMENTS


def block_elements(array: Tensor) -> int:
    """Return the elements of a block of the form of `array`."""
    return array.shape[0] * _stride(array)


def lay_out(memory: mmap.mmap, start: int, array: Tensor, num_blocks: int) -> list[Tensor]:
    """Return `num_blocks` tensors of the form of `array`, side by side in `memory` from byte `start` on.

    Each is a storage of its own, so that who pickles one does not drag the others along.
    """
    learners, numel = array.shape
    elements = block_elements(array)
    strides = (_stride(array) if learners > 1 else numel, 1)  # for one row what a plain tensor of this shape has
    return [
        torch.frombuffer(memory, dtype=array.dtype, count=elements, offset=offset).as_strided(
            (learners, numel), strides
        )
        for offset in range(
            start, start + num_blocks * elements * array.element_size(), elements * array.element_size()
        )
    ]
