"""What an engine is: it takes means over the learners of a scope, at once or on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from hpcavg.algorithms.schedule import Scope
from hpcavg.engines.compression import WireFormat
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
    """Takes means over the learners of a scope."""

    name: str
    notes: list[str]  # why this engine, and what trials showed
    compresses: bool  # what crosses nodes, if anything does, in the wire format that is asked for

    def allocate(self, array: Tensor) -> Tensor:
        """Return where an array that is to be averaged should live: itself, or memory of the same form.

        array : shape (learners, numel), the same on all ranks. What it holds is the caller's to copy. Collective over
        all learners.
        """

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        wire_format: WireFormat | None = None,
        num_well: int | None = None,
    ) -> None:
        """Write the mean over all learners in `scope` to `out`.

        rows : shape (learners, numel), this rank's learners. out : shape (numel,), same dtype and device; for a single
        learner it may be ``rows[0]`` itself. wire_format : of what crosses nodes, for engines that have a say in it.
        num_well : of how many ranks the mean is where it leaves out the others, whose rows are zero; None: of all.
        Nothing is compressed where ranks are left out. Collective over the scope; every rank gets the same bits.
        """

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        wire_format: WireFormat | None = None,
        count_well: CountWell | None = None,
    ) -> PendingMean:
        """Start the mean of every one of `arrays` as they are now, and return at once.

        Each has shape (learners, numel) and may change while the mean is on its way. An engine has one on its way at a
        time. count_well : returns the `num_well` of all arrays but the first from the mean of that, which is over all
        and goes as it is. Collective over the scope, at the first call for these arrays over all learners.
        """


def take_means(
    engine: Engine,
    arrays: Sequence[Tensor],
    scope: Scope,
    out_of_place: bool = False,
    wire_format: WireFormat | None = None,
    num_well: int | None = None,
) -> list[Tensor]:
    """Return the mean of every one of `arrays` over `scope`; see `Engine.mean`. Collective over the scope.

    Unless it `out_of_place`, the mean of a single learner's array takes its place: no copy, no second array.
    """
    means = []
    for array in arrays:
        mean = torch.empty_like(array[0]) if out_of_place or array.shape[0] > 1 else array[0]
        engine.mean(array, mean, scope, wire_format, num_well)
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
        (mean,) = take_means(engine, [array * scale], scope, num_well=num_well)
        means.append(mean.div_(scale))
    return means
