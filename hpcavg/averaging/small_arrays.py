"""Small arrays travel between nodes with the reports of the learners: they need no collective of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.averaging.calls import Meeting
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.averaging.health import Excluded
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import scale_of_large
from hpcavg.engines.reduction import Array, Values, add_up, as_array, divide, put

# All learners get the arrays of all: more than this takes longer than a collective of its own.
_GATHERED_BYTES = 64 * 1024
_ALIGNMENT_BYTES = 16


class SmallArrays:
    """The arrays of a learner that travel with its reports: the smallest ones, as long as there is room.

    Their sums are over the learners of each node in their order, then over the nodes in their order. Nothing is
    compressed.

    Parameters
    ----------
    flats : hold the arrays.
    topology : the learners. Its reports get room for the arrays.
    """

    def __init__(self, flats: Sequence[FlatBuffer], topology: Topology) -> None:
        self._topology = topology
        self._places: list[_Place] = []
        # Inside a node, a mean of its own is faster: there are no messages, only a barrier.
        room = _GATHERED_BYTES // topology.num_learner_ranks if topology.num_nodes > 1 else 0
        start = 0
        sized = [(array.nbytes, flat, index) for flat in flats for index, array in enumerate(flat.arrays)]
        for num_bytes, flat, index in sorted(sized, key=lambda each: each[0]):
            end = start + -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            if num_bytes and end <= room and flat.arrays[index].device.type == "cpu":
                self._places.append(_Place(flat, index, slice(start, start + num_bytes)))
                start = end
        self._packed = np.zeros(start, dtype=np.uint8)
        topology.room_bytes = max(topology.room_bytes, start)
        self._views = [_rows(self._packed[place.bytes], place.array) for place in self._places]

    def pack(self, sick_rows: Sequence[int]) -> Values:
        """Return the bytes of all arrays; zeros for the learners in the sick rows."""
        for place, view in zip(self._places, self._views, strict=True):
            if isinstance(view, np.ndarray):
                view[...] = place.array.numpy()
            else:
                view.copy_(place.array)
            if sick_rows:
                view[list(sick_rows)] = 0
        return self._packed

    def means(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        meeting: Meeting,
        out_of_place: bool,
        excluded: Excluded,
    ) -> dict[int, Tensor]:
        """Return the means of those of `arrays` that travelled, shape (numel,), by their index.

        Parameters
        ----------
        arrays : arrays of the flat buffers.
        scope : the learners that have met.
        meeting : what they reported, with `pack`.
        out_of_place : leave the arrays intact.
        excluded : the sick learners.
        """
        if isinstance(scope, Neighbours) or not self._places:
            return {}
        count = meeting.num_members if excluded.num_well is None else excluded.num_well
        by_node = self._topology.by_node(scope)
        means = {}
        for place in self._places:
            array = place.array
            index = next((at for at, other in enumerate(arrays) if other is array), None)
            if index is None:
                continue
            learners = array.shape[0]
            mean = array[0] if learners == 1 and not out_of_place else torch.empty_like(array[0])
            rows = _rows(meeting.packed[:, place.bytes], array)
            scale = scale_of_large(array, meeting.num_members) if meeting.is_large else 1.0
            target = as_array(mean)
            total = target if isinstance(target, np.ndarray) else np.empty(len(target), dtype=np.float32)
            _sum(rows if scale == 1.0 else rows * scale, by_node, learners, total)
            divide(total, count)
            if scale != 1.0:
                np.divide(total, total.dtype.type(scale), out=total)
            if total is not target:
                put(total, target)
            means[index] = mean
        return means


def _sum(rows: Array, by_node: Sequence[Sequence[int]], learners: int, total: Values) -> None:
    """Write the sum of all rows to `total`: of each node in their order, then of the nodes.

    Parameters
    ----------
    rows : `learners` rows of each rank, shape (rows, numel).
    by_node : the ranks of each node.
    learners : number of rows of a rank.
    total : shape (numel,).
    """
    nodes = [[rows[learners * rank + row] for rank in ranks for row in range(learners)] for ranks in by_node]
    add_up(nodes[0], total)
    for parts in nodes[1:]:
        own = np.empty_like(total)
        add_up(parts, own)
        np.add(total, own, out=total)


@dataclass(frozen=True)
class _Place:
    """The place of an array in the bytes of all."""

    flat: FlatBuffer
    index: int
    bytes: slice

    @property
    def array(self) -> Tensor:
        """The array, shape (learners, numel). It is another one after a loss of ranks."""
        return self.flat.arrays[self.index]


def _rows(packed: Values, array: Tensor) -> Array:
    """Return `packed`, shape (..., bytes), as rows like those of `array`, shape (rows, numel)."""
    numel = array.shape[1]
    if isinstance(example := as_array(array), np.ndarray):
        return packed.view(example.dtype).reshape(-1, numel)
    return torch.from_numpy(packed).view(array.dtype).reshape(-1, numel)
