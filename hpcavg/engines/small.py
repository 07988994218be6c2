"""Means of small arrays on one node, with one barrier or one message."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from torch import Tensor

from hpcavg.engines.reduction import Array, add_up, as_array, average, divide


class TinyMean:
    """The mean of one row of a few KiB over the ranks of a node, by MPI_Allreduce: nothing else is as fast.

    Parameters
    ----------
    own : the row of this rank, shape (1, numel); not in half precision.
    node : the ranks.
    """

    def __init__(self, own: Tensor, node: MPI.Comm) -> None:
        self._own = own[0].numpy()
        self._allreduce = node.Allreduce

    def __call__(self, out: Tensor | None, count: int) -> None:
        """Write the mean to `out`; see `SmallMean`."""
        target = self._own
        if out is not None:
            target = out.numpy()
            target[...] = self._own
        self._allreduce(MPI.IN_PLACE, target)
        divide(target, count)


class SmallMean:
    """The mean of one small array over the ranks of a node: each rank sums copies of all rows.

    Two sets of copies alternate. The mean after the next one overwrites this set; all ranks have then passed the
    barrier of the next mean, and no longer read this set. What does not change is looked up once: the mean takes no
    longer than its barrier and its sums.

    Parameters
    ----------
    own : the rows of this rank, shape (learners, numel).
    copies : for each set, this rank's copy of `own`, and the rows of all copies.
    node : the ranks.
    """

    def __init__(self, own: Tensor, copies: list[tuple[Tensor, list[Array]]], node: MPI.Comm) -> None:
        self._own = own
        self._first = as_array(own[0])
        self._sets = copies
        self._turn = 0
        self._barrier = node.Barrier

    def __call__(self, out: Tensor | None, count: int) -> None:
        """Write the mean to `out`. Collective over the node.

        Parameters
        ----------
        out : shape (numel,); None: the first row of this rank.
        count : the divisor.
        """
        copy, rows = self._sets[self._turn]
        self._turn ^= 1
        copy.copy_(self._own)
        self._barrier()
        target = self._first if out is None else as_array(out)
        if isinstance(target, np.ndarray):
            add_up(rows, target)
            divide(target, count)
        else:
            average(rows, [target], 0, len(target), count)
