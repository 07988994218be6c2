"""The interface of engines. An engine takes means over the learners of a scope: blocking, or in the background."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.engines.crossing import Crossing
from hpcavg.engines.pending import CountWell


class PendingMean(Protocol):
    """A mean that was started and may still be in progress."""

    @property
    def done_s(self) -> float | None:
        """End of the mean, as `time.perf_counter`; None during the mean."""

    def test(self) -> bool:
        """Return whether the mean has ended, without waiting."""

    def wait(self) -> list[Tensor]:
        """Wait for the mean and return it, for every array with shape (numel,)."""

    @property
    def is_complete(self) -> bool:
        """Whether the mean has ended without an exception of MPI."""

    def settle(self, is_complete: bool) -> list[Tensor]:
        """End the mean after a death of ranks.

        Parameters
        ----------
        is_complete : whether the survivors have agreed that the mean is complete.

        Returns
        -------
        list of Tensor
            The mean of every array if `is_complete`, else an empty list.
        """


class Engine(Protocol):
    """Takes means over the learners of a scope.

    Attributes
    ----------
    name : its name.
    notes : the reason for the choice of this engine, and results of trials.
    compresses : whether messages between nodes, if there are any, have the wire format that the engine was given.
    crossings : the way of arrays between nodes, by size class, where a trial has found it. A checkpoint keeps it: the
        order of a sum may depend on it.
    delayed_crossings : the same, of means in the background.
    """

    name: str
    notes: list[str]
    compresses: bool
    crossings: Mapping[str, Crossing]
    delayed_crossings: Mapping[str, Crossing]

    def use_crossings(self, crossings: Mapping[str, Crossing]) -> None:
        """Take these ways of arrays between nodes from now on, by size class. The same on all ranks.

        Engines without a trial ignore them.
        """

    def allocate(self, array: Tensor) -> Tensor:
        """Return memory for an array, in which the engine averages it fast. Collective over all learners.

        Parameters
        ----------
        array : an array with shape (learners, numel) and dtype of the wanted memory, the same on all ranks.

        Returns
        -------
        Tensor
            `array` itself, or memory with the same shape, dtype and device. The caller copies the values to it.
        """

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over all learners in `scope` to `out`. Collective over the scope; all get the same bits.

        Parameters
        ----------
        rows : the values of this rank's learners, shape (learners, numel). If the scope is this rank alone, they may be
            a part of its rows, such as those of one local group.
        out : the mean, shape (numel,), with the same dtype and device; or `rows` itself, of which every row becomes the
            mean.
        scope : the learners; not `Neighbours`.
        num_well : number of learners that the mean includes. The rows of other learners must be zero, and nothing is
            compressed. None: all learners.
        exact : compress nothing.
        """

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of every learner. Collective over the neighbours.

        Parameters
        ----------
        rows : the values of this rank's learners, shape (learners, numel). If the scope is this rank alone, they may be
            a part of its rows, such as those of one local group.
        out : the means, shape (learners, numel), with the same dtype and device. It may be `rows` itself.
        scope : the graph, with its weights.
        """

    def start(self, arrays: Sequence[Tensor], scope: Scope, count_well: CountWell | None = None) -> PendingMean:
        """Start the mean of the current values of every array, and return at once.

        Only one such mean of an engine may be in progress. Collective over the scope; the first call for these arrays
        is collective over all learners.

        Parameters
        ----------
        arrays : arrays of shape (learners, numel). They may change during the mean.
        scope : the learners; not `Neighbours`.
        count_well : returns the `num_well` of the other arrays from the mean of the first array. The mean of the first
            array is exact and over all its rows.
        """


class WithoutCrossings:
    """A part of engines that make no trial of ways between nodes."""

    crossings: Mapping[str, Crossing] = MappingProxyType({})
    delayed_crossings: Mapping[str, Crossing] = MappingProxyType({})

    def use_crossings(self, crossings: Mapping[str, Crossing]) -> None:
        """Do nothing."""


def take_means(
    engine: Engine,
    arrays: Sequence[Tensor],
    scope: Scope,
    out_of_place: bool = False,
    num_well: int | None = None,
    exact: bool = False,
) -> list[Tensor]:
    """Return the mean of every array over `scope`. Collective over the scope.

    Parameters
    ----------
    engine : takes the means.
    arrays : arrays of shape (learners, numel).
    scope : the learners; not `Neighbours`.
    out_of_place : leave the arrays intact, and return means of shape (numel,). Otherwise the mean replaces every row
        of an array, and the array is returned: this saves a copy and memory.
    num_well : see `Engine.mean`.
    exact : see `Engine.mean`.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from hpcavg import Topology
    >>> from hpcavg.algorithms.scope import GLOBAL
    >>> from hpcavg.engines.mpi import MpiEngine
    >>> engine = MpiEngine(Topology(MPI.COMM_SELF))
    >>> take_means(engine, [torch.tensor([[1.0, 2.0], [3.0, 4.0]])], GLOBAL)
    [tensor([[2., 3.],
            [2., 3.]])]
    """
    means = []
    for array in arrays:
        out = torch.empty_like(array[0]) if out_of_place else array
        engine.mean(array, out, scope, num_well, exact)
        means.append(out)
    return means


def take_mixed(engine: Engine, arrays: Sequence[Tensor], scope: Neighbours, out_of_place: bool = False) -> list[Tensor]:
    """Return, for every array, the weighted means of the learners here, shape (learners, numel).

    Collective over the neighbours.

    Parameters
    ----------
    engine : takes the means.
    arrays : arrays of shape (learners, numel).
    scope : the graph.
    out_of_place : leave the arrays intact. Otherwise the means replace the rows, and the arrays are returned.
    """
    mixed = [torch.empty_like(array) if out_of_place else array for array in arrays]
    for array, out in zip(arrays, mixed, strict=True):
        engine.mix(array, out, scope)
    return mixed


def take_means_of_large(
    engine: Engine, arrays: Sequence[Tensor], scope: Scope, num_members: int, num_well: int | None
) -> list[Tensor]:
    """Return the means of values whose sum may overflow, shape (numel,). Collective over the scope.

    It divides copies by a power of two, which is exact, and multiplies the means by it.

    Parameters
    ----------
    engine : takes the means.
    arrays : arrays of shape (learners, numel).
    scope : the learners.
    num_members : number of learners in the scope.
    num_well : see `Engine.mean`.
    """
    means = []
    for array in arrays:
        scale = scale_of_large(array, num_members)
        (mean,) = take_means(engine, [array * scale], scope, num_well=num_well, exact=True)
        means.append(mean[0].div_(scale))
    return means


def scale_of_large(array: Tensor, num_members: int) -> float:
    """Return the power of two by which values are multiplied so that the sum of `num_members` does not overflow."""
    # float16 is summed in float32, which does not overflow.
    return 1.0 if array.dtype == torch.float16 else 2.0 ** -num_members.bit_length()
