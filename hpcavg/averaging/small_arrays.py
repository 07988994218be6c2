"""Small arrays travel with the reports of the learners: a mean of them needs no collective of its own."""

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
from hpcavg.engines.reduction import Array, Values, add_up, as_array, divide, put, sum_dtype

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
        room, start = _GATHERED_BYTES // topology.num_learner_ranks, 0
        sized = [(array.nbytes, flat, index) for flat in flats for index, array in enumerate(flat.arrays)]
        for num_bytes, flat, index in sorted(sized, key=lambda each: each[0]):
            end = start + -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
            if num_bytes and end <= room and flat.arrays[index].device.type == "cpu":
                self._places.append(_Place(flat, index, slice(start, start + num_bytes)))
                start = end
        self._packed = np.zeros(start, dtype=np.uint8)
        topology.room_bytes = max(topology.room_bytes, start)
        self._views = [_rows(self._packed[place.bytes], place.array) for place in self._places]

    def pack(self, is_sick: bool) -> Values:
        """Return the bytes of all arrays; zeros for a learner that is sick."""
        if is_sick:
            self._packed.fill(0)
            return self._packed
        for place, view in zip(self._places, self._views, strict=True):
            view.copy_(place.array)
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
        indices = {id(array): index for index, array in enumerate(arrays)}
        count = meeting.num_members if excluded.num_well is None else excluded.num_well
        means = {}
        for place in self._places:
            array = place.array
            index = indices.get(id(array))
            if index is None:
                continue
            mean = array[0] if array.shape[0] == 1 and not out_of_place else torch.empty_like(array[0])
            rows = as_array(_rows(meeting.packed[:, place.bytes], array))
            scale = scale_of_large(array, meeting.num_members) if meeting.is_large else 1.0
            total = self._sum(rows if scale == 1.0 else rows * scale, scope, array.shape[0])
            divide(total, count * array.shape[0])
            put(total if scale == 1.0 else total / total.dtype.type(scale), as_array(mean))
            means[index] = mean
        return means

    def _sum(self, rows: Array, scope: Scope, num_learners: int) -> Values:
        """Return the sum of all rows. Each of the members of `scope` has `num_learners` of them."""
        sums = []
        for members in self._topology.by_node(scope):
            parts = [rows[num_learners * member + learner] for member in members for learner in range(num_learners)]
            total = np.empty(parts[0].shape, dtype=sum_dtype(parts[0]))
            add_up(parts, total)
            sums.append(total)
        if len(sums) > 1:
            add_up(sums, sums[0])
        return sums[0]


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


def _rows(packed: Values, array: Tensor) -> Tensor:
    """Return `packed` as rows like those of `array`, shape (rows, numel)."""
    return torch.from_numpy(packed).view(array.dtype).reshape(-1, array.shape[1])
