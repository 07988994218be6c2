"""What engines share that sum device memory in place: half precision passes through pieces of float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import WithoutCrossings
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.mpi import MAX_CHUNK_ELEMENTS, MpiEngine, as_real
from hpcavg.engines.staged import average_own

Sum: TypeAlias = Callable[[Tensor], None]
"""Replaces float32 or float64, shape (numel,), by the sum over the ranks of a scope. Collective over the scope."""

# Half precision is converted in pieces of 16 MiB of float32.
_SCRATCH_ELEMENTS = 4 * 2**20


class AllreduceEngine(WithoutCrossings):
    """Base of engines whose blocking mean is a sum in place, and a division.

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

    def _sum_over(self, scope: Scope) -> Sum:
        """Return the sum over `scope`. Collective over the scope."""
        raise NotImplementedError

    def allocate(self, array: Tensor) -> Tensor:
        """Return `array`: any memory can be summed."""
        return array

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine`."""
        average_own(rows, out)
        self._average(out, self._sum_over(scope), num_well or self._topology.comm(scope).Get_size())

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of the neighbours to this rank's row, through host memory."""
        self._cuda.synchronize(rows.device)
        self._mpi.mix(rows, out, scope)

    def _average(self, values: Tensor, sum_up: Sum, num_ranks: int) -> None:
        """Replace `values`, shape (numel,), by their sum divided by `num_ranks`."""
        values = as_real(values)
        dtype, elements = wide(values.dtype), self._max_chunk_elements
        if dtype is not values.dtype:
            elements = min(elements, _SCRATCH_ELEMENTS)
        for chunk in values.split(elements) if values.numel() else ():
            total = chunk.to(dtype)
            sum_up(total)
            divide(total, num_ranks)
            if total is not chunk:
                chunk.copy_(total)


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are summed: float32 for half precision, else their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def divide(total: Tensor, count: int) -> None:
    """Divide `total` by `count` in place.

    The divisor is on the device: CUDA multiplies by the reciprocal of a number on the host, which rounds twice.

    Examples
    --------
    >>> total = torch.tensor([3.0, 5.0])
    >>> divide(total, 2)
    >>> total
    tensor([1.5000, 2.5000])
    """
    total.div_(torch.full((), count, dtype=total.dtype, device=total.device))
