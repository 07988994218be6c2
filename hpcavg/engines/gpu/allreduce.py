"""What engines share that sum device memory in place: half precision passes through pieces of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import WithoutCrossings
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.inside import as_real, divide, mean_of_rows, sum_rows, targets_of, wide
from hpcavg.engines.mpi import MAX_CHUNK_ELEMENTS, MpiEngine

Sum: TypeAlias = Callable[[Tensor], None]
"""Replaces float32 or float64, shape (numel,), by the sum over the ranks of a scope. Collective over the scope."""

# Half precision is converted in pieces of 16 MiB of float32.
_SCRATCH_ELEMENTS = 4 * 2**20


class AllreduceEngine(WithoutCrossings):
    """A part of engines whose blocking mean is a sum in place, and a division.

    Means of neighbours go through host memory.

    Parameters
    ----------
    topology : the ranks.
    max_chunk_elements : maximum number of elements of one sum.
    cuda : the calls to CUDA; None for the real ones.
    """

    compresses = False

    def __init__(
        self, topology: Topology, max_chunk_elements: int = MAX_CHUNK_ELEMENTS, cuda: Cuda | None = None
    ) -> None:
        self._topology = topology
        self._max_chunk_elements = max_chunk_elements
        self.notes: list[str] = []
        self._cuda = cuda or Cuda()
        self._mpi = MpiEngine(topology)

    def allocate(self, array: Tensor) -> Tensor:
        """Return `array`: any memory can be summed."""
        return array

    def _mean_by(
        self,
        sum_over: Callable[[Scope], Sum],
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine.mean`.

        Parameters
        ----------
        sum_over : returns the sum over a scope. Collective over the scope.
        rows : the values of this rank's learners.
        out : the mean.
        scope : the learners.
        num_well : number of learners that the mean includes.
        """
        size = self._topology.comm(scope).Get_size()
        if size == 1:
            mean_of_rows(rows, out, num_well)
        else:
            real, count = as_real(rows), num_well or size * len(rows)
            self._average(real, targets_of(real, as_real(out)), sum_over(scope), count)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of each learner, through host memory."""
        self._cuda.synchronize(rows.device)
        self._mpi.mix(rows, out, scope)

    def _average(self, rows: Tensor, targets: Tensor, sum_up: Sum, count: int) -> None:
        """Write the sum of all `rows`, divided by `count`, to all `targets`; both have shape (..., numel)."""
        dtype, elements = wide(rows.dtype), self._max_chunk_elements
        if dtype is not rows.dtype:
            elements = min(elements, _SCRATCH_ELEMENTS)
        for first in range(0, rows.shape[1], elements):
            part = targets[:, first : first + elements]
            own = part[0] if dtype is rows.dtype else None
            total = sum_rows(rows[:, first : first + elements].unbind(), own)
            sum_up(total)
            divide(total, count)
            if own is None:
                part.copy_(total)
            elif len(part) > 1:
                part[1:].copy_(total)
