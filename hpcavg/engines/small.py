"""Means of small arrays. What does not change is looked up once: a mean takes little longer than its messages and sums.

Each class takes the mean of one array over one scope. A call is collective over the scope. It takes ``out``, shape
(numel,), or None for a mean that replaces the rows of this rank, and ``count``, the divisor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

import numpy as np
from mpi4py import MPI
from torch import Tensor

from hpcavg.engines.reduction import Array, Values, add_up, as_array, average, divide, put

SmallMean: TypeAlias = Callable[[Tensor | None, int], None]
"""One of the classes of this module, as a function of ``out`` and ``count``."""


class AllreduceMean:
    """The mean by MPI_Allreduce, in place, of the sum of this rank's rows.

    Parameters
    ----------
    own : the rows of this rank, shape (learners, numel); not in half precision.
    comm : the ranks.
    """

    def __init__(self, own: Tensor, comm: MPI.Comm) -> None:
        self._own = [row.numpy() for row in own]
        self._allreduce = comm.Allreduce

    def __call__(self, out: Tensor | None, count: int) -> None:
        """Take the mean."""
        target = self._own[0] if out is None else out.numpy()
        if out is not None or len(self._own) > 1:
            add_up(self._own, target)
        self._allreduce(MPI.IN_PLACE, target)
        divide(target, count)
        if out is None:
            for row in self._own[1:]:
                put(target, row)


class CopiesMean:
    """The mean over a node with one barrier: each rank sums copies of all rows in shared memory.

    Two sets of copies alternate. The mean after the next one overwrites this set; all ranks have then passed the
    barrier of the next mean, and no longer read this set.

    Parameters
    ----------
    own : the rows of this rank, shape (learners, numel).
    copies : for each set, this rank's copy of `own`, and the rows of all copies.
    turns : the index of the set for each mean. Means in place and others share the sets, and alternate all the same.
    node : the ranks.
    """

    def __init__(
        self, own: Tensor, copies: Sequence[tuple[Tensor, list[Array]]], turns: Iterator[int], node: MPI.Comm
    ) -> None:
        self._own = own
        self._own_rows = list(map(as_array, own))
        self._copies = copies
        self._turns = turns
        self._barrier = node.Barrier

    def __call__(self, out: Tensor | None, count: int) -> None:
        """Take the mean."""
        copy, rows = self._copies[next(self._turns)]
        copy.copy_(self._own)
        self._barrier()
        targets = self._own_rows if out is None else [as_array(out)]
        target = targets[0]
        if isinstance(target, np.ndarray):
            add_up(rows, target)
            divide(target, count)
            for other in targets[1:]:
                put(target, other)
        else:
            average(rows, targets, 0, len(target), count)


class LaneMean:
    """The mean over nodes of several ranks, in place, with one MPI_Allreduce in each lane.

    Parameters
    ----------
    rows : this rank's slice of the rows of its node, in shared memory; not in half precision.
    node : the ranks of this node.
    lane : the ranks with the same slice; None if this rank has no slice.
    """

    def __init__(self, rows: Sequence[Values], node: MPI.Comm, lane: MPI.Comm | None) -> None:
        self._rows = rows
        self._barrier = node.Barrier
        self._allreduce = None if lane is None else lane.Allreduce

    def __call__(self, out: Tensor | None, count: int) -> None:
        """Take the mean; `out` is None."""
        self._barrier()  # all rows are final
        if self._allreduce is not None:
            total = self._rows[0]
            add_up(self._rows, total)
            self._allreduce(MPI.IN_PLACE, total)
            divide(total, count)
            for row in self._rows[1:]:
                put(total, row)
        self._barrier()  # the mean is complete
