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
from hpcavg.engines.inside import as_real, mean_of_rows, sum_rows, targets_of
from hpcavg.engines.neighbours import mix
from hpcavg.engines.pending import CountWell, SteppedMean, all_done
from hpcavg.engines.reduction import gather, spread
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
        comm = self._topology.comm(scope)
        if comm.Get_size() == 1:
            mean_of_rows(rows, out, num_well)
        else:
            count = num_well or comm.Get_size() * len(rows)
            real = as_real(rows)
            self._average(comm, real, targets_of(real, as_real(out)), count)

    def _average(self, comm: MPI.Comm, rows: Tensor, targets: Tensor, count: int) -> None:
        """Write the sum of `rows` over `comm`, divided by `count`, to all targets.

        A product with 1/count would round twice.
        """
        numel = rows.shape[1]
        if _is_reducible(rows):
            own = [row.numpy() for row in rows]
            others = own if targets is rows else [target.numpy() for target in targets]
            for first in range(0, numel, self._max_chunk_elements):
                total = gather(own, others, first, min(first + self._max_chunk_elements, numel))
                comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)
                spread(total, count, others, first)
            return
        size = min(_STAGING_ELEMENTS, self._max_chunk_elements)
        for first in range(0, numel, size):
            staged = sum_rows(rows[:, first : first + size].unbind()).cpu()
            comm.Allreduce(MPI.IN_PLACE, staged.numpy(), MPI.SUM)
            targets[:, first : first + size].copy_(staged.div_(count))

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of each learner; see `hpcavg.engines.base.Engine`."""
        own = as_real(rows).cpu()
        mixed = as_real(out) if out.device.type == "cpu" else torch.empty_like(own)
        mix(own, mixed, self._topology, scope, {})
        if out.device.type != "cpu":
            as_real(out).copy_(mixed)

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
        sums = [sum_rows(rows.unbind()) for rows in arrays]
        staged = [as_real(total).cpu() for total in sums]
        requests = [
            comm.Iallreduce(MPI.IN_PLACE, host_memory(chunk), MPI.SUM)
            for values in staged
            for chunk in values.split(self._max_chunk_elements)
        ]

        def collect() -> list[Tensor]:
            num_well, means = None, []
            for rows, total, values in zip(arrays, sums, staged, strict=True):
                values.div_(num_well or comm.Get_size() * len(rows))
                if values.device != total.device:
                    as_real(total).copy_(values)
                means.append(total.to(rows.dtype))
                if len(means) == 1 and count_well is not None:
                    num_well = count_well(means[0])
            return means

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


def _is_reducible(values: Tensor) -> bool:
    return values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64)
