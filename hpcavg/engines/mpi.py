"""The portable engine: MPI_Allreduce in place on the flat buffer; MPI_Iallreduce on a copy for delayed means."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import WithoutCrossings
from hpcavg.engines.compression import WireFormat
from hpcavg.engines.neighbours import mix
from hpcavg.engines.pending import CountWell, SteppedMean, all_done
from hpcavg.engines.reduction import divide
from hpcavg.errors import InputError

MAX_CHUNK_ELEMENTS = 2**31 - 1
"""The largest count of MPI, a 32-bit C integer. Open MPI 5 has no MPI_Allreduce_c."""

# Arrays that MPI cannot reduce pass through host memory in pieces: 16 MiB of float32.
_STAGING_ELEMENTS = 4 * 2**20


class MpiEngine(WithoutCrossings):
    """Means by MPI_Allreduce.

    float32 and float64 in host memory are reduced in place. Other arrays pass through a small buffer in host memory:
    half precision, which MPI has no type for, is summed in float32, and so are arrays on other devices.

    Parameters
    ----------
    topology : the ranks.
    wire_format : ignored: MPI cannot reduce compressed values.
    max_chunk_elements : maximum count of a call of MPI.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from hpcavg import Topology
    >>> from hpcavg.algorithms.scope import GLOBAL
    >>> rows, mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.empty(2)
    >>> MpiEngine(Topology(MPI.COMM_SELF)).mean(rows, mean, GLOBAL)
    >>> mean
    tensor([2., 3.])
    """

    name = "mpi"
    compresses = False

    def __init__(
        self,
        topology: Topology,
        wire_format: WireFormat | None = None,
        max_chunk_elements: int = MAX_CHUNK_ELEMENTS,
    ) -> None:
        self._topology = topology
        self._max_chunk_elements = max_chunk_elements
        self.notes: list[str] = []

    def allocate(self, array: Tensor) -> Tensor:
        """Return `array`: MPI reduces it in any memory."""
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
        num_local_learners = rows.shape[0]
        if num_local_learners > 1:
            torch.sum(rows, dim=0, out=out)
        elif out.data_ptr() != rows.data_ptr():
            out.copy_(rows[0])
        comm = self._topology.comm(scope)
        if comm.Get_size() * num_local_learners > 1:
            num_ranks = comm.Get_size() if num_well is None else num_well
            self._average(comm, as_real(out), num_ranks * num_local_learners)

    def _average(self, comm: MPI.Comm, values: Tensor, num_learners: int) -> None:
        """Sum `values` over `comm` in place and divide by `num_learners`; a product with 1/n would round twice."""
        if _is_reducible(values):
            array = values.numpy()
            for first in range(0, len(array), self._max_chunk_elements):
                chunk = array[first : first + self._max_chunk_elements]
                comm.Allreduce(MPI.IN_PLACE, chunk, MPI.SUM)
                divide(chunk, num_learners)
            return
        for chunk in values.split(min(_STAGING_ELEMENTS, self._max_chunk_elements)):
            staged = _staged(chunk)
            comm.Allreduce(MPI.IN_PLACE, staged.numpy(), MPI.SUM)
            chunk.copy_(staged.div_(num_learners))

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of the neighbours to this rank's row; see `hpcavg.engines.base.Engine`."""
        own = as_real(rows[0]).cpu()
        mixed = as_real(out[0]) if out.device.type == "cpu" else torch.empty_like(own)
        mix(own, mixed, self._topology.links(scope), {}, self._topology.comm(scope))
        if out.device.type != "cpu":
            as_real(out[0]).copy_(mixed)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> SteppedMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`.

        The copies are in host memory: MPI's non-blocking reductions do not accept device memory.
        """
        comm = self._topology.background_comm(scope, self)
        sums = [rows.sum(dim=0) if rows.shape[0] > 1 else rows[0].clone() for rows in arrays]
        reals = [as_real(total) for total in sums]
        staged = [values if _is_reducible(values) else _staged(values) for values in reals]
        requests = [
            comm.Iallreduce(MPI.IN_PLACE, host_memory(chunk), MPI.SUM)
            for values in staged
            for chunk in values.split(self._max_chunk_elements)
        ]

        def collect() -> list[Tensor]:
            num_ranks = comm.Get_size()
            for index, (rows, values, total) in enumerate(zip(arrays, staged, reals, strict=True)):
                values.div_(num_ranks * rows.shape[0])
                if values is not total:
                    total.copy_(values)
                if index == 0 and count_well is not None and (num_well := count_well(total)) is not None:
                    num_ranks = num_well
            return sums

        return SteppedMean(itertools.chain(all_done(requests), self._topology.completion(comm)), collect)


def host_memory(values: Tensor) -> NDArray[np.generic]:
    """Return `values` as an array for a non-blocking reduction, which crashes with device memory.

    Raises
    ------
    InputError
        If `values` are on a device.
    """
    if values.device.type != "cpu":
        raise InputError("device", str(values.device), "cpu for what MPI works on in the background")
    return values.numpy()


def as_real(values: Tensor) -> Tensor:
    """Return the memory of `values` as a tensor of real numbers, shape (numel,) if they are complex.

    MPI and NumPy can sum real numbers only.
    """
    return torch.view_as_real(values).view(-1) if values.is_complex() else values


def _is_reducible(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)


def _staged(values: Tensor) -> Tensor:
    """Return a copy of `values` in host memory, in a dtype that MPI can sum."""
    return values.to("cpu", torch.float64 if values.dtype == torch.float64 else torch.float32)
