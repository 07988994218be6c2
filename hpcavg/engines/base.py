"""What an engine is: it takes means over the learners of a scope, at once or on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.engines.pending import CountWell


class PendingMean(Protocol):
    """A mean that was started."""

    @property
    def done_s(self) -> float | None:
        """When it was there, on the clock of `time.perf_counter`; None while it is on its way."""

    def test(self) -> bool:
        """Return whether it is there."""

    def wait(self) -> list[Tensor]:
        """Return the mean of every array, waiting for it where need be."""

    @property
    def is_complete(self) -> bool:
        """Whether it is there; False, too, once MPI has raised an exception in its place."""

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Take no more steps: return the mean where `is_complete`, as others know it to be, else nothing."""


class Engine(Protocol):
    """Takes means over the learners of a scope.

    Attributes
    ----------
    name : its name.
    notes : why this engine was chosen, and what trials showed.
    compresses : whether what crosses nodes, if anything does, travels in the wire format that the engine was given.
    """

    name: str
    notes: list[str]
    compresses: bool

    def allocate(self, array: Tensor) -> Tensor:
        """Return the memory in which an array that is to be averaged should live. Collective over all learners.

        Parameters
        ----------
        array : shape (learners, numel), the same on all ranks. The caller copies its values.

        Returns
        -------
        Tensor
            `array` itself, or memory of the same form.
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
        rows : shape (learners, numel), this rank's learners.
        out : shape (numel,), same dtype and device. If the rank has one learner, it may be ``rows[0]`` itself.
        scope : the learners; no `Neighbours`.
        num_well : the number of ranks that the mean is of, if it leaves out the others, whose rows are zero. None: all.
            If ranks are left out, nothing is compressed.
        exact : compress nothing.
        """

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of every learner. Collective over the neighbours.

        Parameters
        ----------
        rows : shape (learners, numel), this rank's learners.
        out : shape (learners, numel), same dtype and device; it may be `rows` itself.
        scope : the graph, with its weights.
        """

    def start(self, arrays: Sequence[Tensor], scope: Scope, count_well: CountWell | None = None) -> PendingMean:
        """Start the mean of every array as it is now, and return at once.

        An engine has one such mean on its way at a time. Collective over the scope; at the first call for these arrays
        over all learners.

        Parameters
        ----------
        arrays : each of shape (learners, numel). They may change while the mean is on its way.
        scope : the learners; no `Neighbours`.
        count_well : returns the `num_well` of all arrays but the first from the mean of the first array, which is over
            all learners and exact.
        """


def take_means(
    engine: Engine,
    arrays: Sequence[Tensor],
    scope: Scope,
    out_of_place: bool = False,
    num_well: int | None = None,
    exact: bool = False,
) -> list[Tensor]:
    """Return the mean of every array over `scope`, shape (numel,). Collective over the scope.

    Parameters
    ----------
    engine : takes the means.
    arrays : each of shape (learners, numel).
    scope : the learners. The means of `Neighbours` are those of this rank's learner.
    out_of_place : leave the arrays intact. Otherwise the mean of a single learner takes the array's place: that saves a
        copy and a second array.
    num_well : see `Engine.mean`; None for `Neighbours`.
    exact : see `Engine.mean`.
    """
    means = []
    for array in arrays:
        if isinstance(scope, Neighbours):
            mixed = torch.empty_like(array) if out_of_place else array
            engine.mix(array, mixed, scope)
            mean = mixed[0]
        else:
            mean = torch.empty_like(array[0]) if out_of_place or array.shape[0] > 1 else array[0]
            engine.mean(array, mean, scope, num_well, exact)
        means.append(mean)
    return means


def take_means_of_large(
    engine: Engine, arrays: Sequence[Tensor], scope: Scope, num_members: int, num_well: int | None
) -> list[Tensor]:
    """Return the means of values whose sum may overflow: of copies divided by a power of two, which is exact.

    num_members : how many learners are in the scope. num_well : the divisor; see `Engine.mean`. Collective over the
    scope.
    """
    means = []
    for array in arrays:
        # Sums of float16 are taken in float32, and do not overflow.
        scale = 1.0 if array.dtype == torch.float16 else 2.0 ** -num_members.bit_length()
        (mean,) = take_means(engine, [array * scale], scope, num_well=num_well, exact=True)
        means.append(mean.div_(scale))
    return means
