"""Constant buffers: a mean does not change the bits of buffers that no learner has changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcavg.averaging.flat_buffer import FlatBuffer


class Constants:
    """Restores buffers that no learner has changed since the start.

    The mean of equal values may differ from them by rounding, or overflow. Every learner therefore adds a mark for each
    buffer to the mean of the buffers: 1 if it has changed the buffer, else 0. If the mean of a buffer's marks is 0, the
    values of the start are restored. This needs no exchange of its own.

    Parameters
    ----------
    buffers : the averaged buffers; the last slot holds the marks, one for each of the other slots.
    is_constant : for each slot but the last, whether all learners start with equal values.
    """

    def __init__(self, buffers: FlatBuffer, is_constant: Sequence[bool]) -> None:
        self._buffers = buffers
        # In the order of memory: adjacent slots are compared and copied as one.
        order = sorted(range(len(is_constant)), key=lambda index: buffers.slots[index][2:4])
        self._slots = [buffers.slots[index] for index in order]
        self._first_values = buffers.snapshot()
        self._keep([is_constant[index] for index in order])

    def _keep(self, is_constant: Sequence[bool]) -> None:
        self._is_constant = is_constant
        self._runs = self._runs_of(0, len(is_constant))
        if not self._runs:
            self._first_values = []

    def _runs_of(self, first: int, last: int) -> list[tuple[int, int]]:
        """Return the runs of adjacent constant slots within ``[first:last]``, as pairs (first, last)."""
        runs: list[tuple[int, int]] = []
        for index in range(first, last):
            if not self._is_constant[index]:
                continue
            if runs and runs[-1][1] == index and self._slots[index].array == self._slots[index - 1].array:
                runs[-1] = (runs[-1][0], index + 1)
            else:
                runs.append((index, index + 1))
        return runs

    def _values(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Return the slots ``[first:last]`` of one array, shape (learners, ...), and their values at the start."""
        start, end = self._slots[first], self._slots[last - 1]
        part = slice(start.start, end.start + end.shape.numel())
        return self._buffers.arrays[start.array][:, part], self._first_values[start.array][:, part]

    def _marks(self) -> Tensor:
        """Return the marks, shape (learners, slots)."""
        slot = self._buffers.slots[-1]
        return self._buffers.arrays[slot.array][:, slot.start : slot.start + slot.shape.numel()]

    def mark(self) -> None:
        """Mark the buffers that this learner has changed, before a mean."""
        if not self._slots:
            return
        marks = self._marks().fill_(1)
        for first, last in self._runs:
            if torch.equal(*self._values(first, last)):
                marks[:, first:last] = 0
            else:
                for index in range(first, last):
                    now, at_first = self._values(index, index + 1)
                    marks[:, index] = (now != at_first).any(dim=1).to(marks.dtype)

    def put_back(self) -> None:
        """Restore the buffers that no learner has changed, after a mean was merged."""
        if not self._runs:
            return
        is_changed = self._marks().any(dim=0).tolist()
        if any(any(is_changed[first:last]) for first, last in self._runs):
            self._keep([now and not changed for now, changed in zip(self._is_constant, is_changed, strict=True)])
        for first, last in self._runs:
            now, at_first = self._values(first, last)
            now.copy_(at_first)
