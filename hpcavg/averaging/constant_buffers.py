"""Buffers that nobody has changed since the start: a mean leaves their bits as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcavg.averaging.flat_buffer import FlatBuffer


class Constants:
    """Keeps the bits of those buffers that no learner has changed, without a word between the learners.

    The mean of equal values need not be equal to them, and that of large ones not even finite. So each learner brings a
    number for every buffer into the mean, along with the buffers: 1 where it has changed it, else 0. Where the mean of
    these is 0, the values of the start are put back.

    Parameters
    ----------
    buffers : where the last slot is for these numbers, one for each of the others.
    is_constant : for each of the others, whether all learners hold the same in it so far.
    """

    def __init__(self, buffers: FlatBuffer, is_constant: Sequence[bool]) -> None:
        self._buffers = buffers
        # In the order of memory, so that neighbours are compared and copied as one.
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
        """Return where constant slots stand next to each other, within ``[first:last]``."""
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
        """Return the memory of the slots ``[first:last]``, of one array, and what it held at the start."""
        start, end = self._slots[first], self._slots[last - 1]
        part = slice(start.start, end.start + end.shape.numel())
        return self._buffers.arrays[start.array][0, part], self._first_values[start.array][0, part]

    def _numbers(self) -> Tensor:
        return self._buffers.view(self._buffers.slots[-1])

    def mark(self) -> None:
        """Write for the mean which buffers this learner has changed."""
        if not self._slots:
            return
        numbers = torch.ones(len(self._slots))
        for first, last in self._runs:
            if torch.equal(*self._values(first, last)):
                numbers[first:last] = 0
            else:
                for index in range(first, last):
                    numbers[index] = float(not torch.equal(*self._values(index, index + 1)))
        self._numbers().copy_(numbers)

    def put_back(self) -> None:
        """Give the buffers that nobody has changed, as a mean tells that was merged, the values of the start."""
        if not self._runs:
            return
        is_changed = self._numbers().tolist()
        if any(any(is_changed[first:last]) for first, last in self._runs):
            self._keep([now and not changed for now, changed in zip(self._is_constant, is_changed, strict=True)])
        for first, last in self._runs:
            now, at_first = self._values(first, last)
            now.copy_(at_first)
