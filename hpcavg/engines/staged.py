"""Device arrays without a CUDA-aware MPI: through page-locked rows in host memory.

If the host engine uses shared memory, the rows are in it, page-locked in place. The only copies are from the device and
back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, PendingMean
from hpcavg.engines.crossing import Crossing
from hpcavg.engines.gpu.cuda import Cuda, Mark
from hpcavg.engines.inside import mean_of_rows, targets_of
from hpcavg.engines.pending import CountWell


@dataclass
class _HostRows:
    """Host memory for the mean of the rows of a device array, or for all its rows.

    Attributes
    ----------
    array : the array.
    rows : the memory, shape (1, numel) or (learners, numel).
    read : end of the last copy to the device, which reads the memory.
    """

    array: Tensor
    rows: Tensor
    read: Mark | None = None


class StagedEngine:
    """Means of device arrays on rows in host memory.

    The learners of a rank are averaged on the device first. Only a mean of neighbours takes all their rows to the host;
    with several, ranks of one node then send each other messages. Arrays keep their dtype, also half precision. Arrays
    in host memory are averaged by the host engine as they are.

    Parameters
    ----------
    topology : the ranks.
    host : the engine for host memory.
    cuda : the calls to CUDA; None for the real ones.

    Attributes
    ----------
    host : the engine for host memory.
    """

    name = "staged"

    def __init__(self, topology: Topology, host: Engine, cuda: Cuda | None = None) -> None:
        self._topology = topology
        self.host = host
        self.notes = host.notes
        self.crossings, self.delayed_crossings = host.crossings, host.delayed_crossings
        self.compresses = host.compresses
        self._cuda = cuda or Cuda()
        self._host_rows: dict[object, _HostRows] = {}
        topology.on_shrink(self._host_rows.clear)

    def use_crossings(self, crossings: Mapping[str, Crossing]) -> None:
        """See `hpcavg.engines.base.Engine`."""
        self.host.use_crossings(crossings)

    def allocate(self, array: Tensor) -> Tensor:
        """Return `array`, which stays on its device. Allocate its row in host memory."""
        if not self._cuda.holds(array):
            return self.host.allocate(array)
        wanted = torch.empty(1, array.shape[1], dtype=array.dtype)
        row = self.host.allocate(wanted)
        if row is wanted:
            row = self._cuda.pinned(wanted)
        else:
            self._cuda.page_lock(row, self)
        self._host_rows[key_of(array), 1] = _HostRows(array, row)
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
        if not self._cuda.holds(rows):
            self.host.mean(rows, out, scope, num_well, exact)
        elif self._topology.comm(scope).Get_size() == 1:
            mean_of_rows(rows, out, num_well)
        else:
            host = self._copy_out(rows)
            self._cuda.synchronize(rows.device)
            self.host.mean(host.rows, host.rows, scope, num_well, exact)
            if num_well is not None:  # the host has divided a sum of the ranks' means by a number of learners
                host.rows.mul_(len(rows))
            targets = targets_of(rows, out)
            self._cuda.copy(targets[0], host.rows[0])
            host.read = self._cuda.mark(out.device)
            if len(targets) > 1:
                self._cuda.copy(targets[1:], targets[:1])

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of its neighbours to the row of each learner; see `hpcavg.engines.base.Engine`."""
        if not self._cuda.holds(rows):
            self.host.mix(rows, out, scope)
            return
        host = self._copy_out(rows, has_all_rows=True)
        self._cuda.synchronize(rows.device)
        self.host.mix(host.rows, host.rows, scope)
        self._cuda.copy(out, host.rows)
        host.read = self._cuda.mark(out.device)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> PendingMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`."""
        rows = [self._copy_out(array).rows if self._cuda.holds(array) else array for array in arrays]
        for device in {array.device for array in arrays}:
            self._cuda.synchronize(device)
        on_device = [array if self._cuda.holds(array) else None for array in arrays]
        pending = _StagedMean(on_device, count_well, self._cuda)
        pending.host = self.host.start(rows, scope, count_well and pending.count_well)
        return pending

    def _copy_out(self, rows: Tensor, has_all_rows: bool = False) -> _HostRows:
        """Queue the copy of this rank's rows to host memory, and return it.

        The memory is kept for an array from `allocate`, and temporary for others.

        Parameters
        ----------
        rows : the rows, shape (learners, numel).
        has_all_rows : copy every row, not their mean.
        """
        num_rows = len(rows) if has_all_rows else 1
        host = self._host_rows.get((key_of(rows), num_rows))
        if host is None:
            form = torch.empty((num_rows, rows.shape[1]), dtype=rows.dtype, device="meta")
            host = _HostRows(rows, self._cuda.pinned(form))
            if (key_of(rows), 1) in self._host_rows:
                self._host_rows[key_of(rows), num_rows] = host
        if host.read is not None:
            host.read.synchronize()  # the copy may be in another stream
        if num_rows < len(rows):
            mean = torch.empty_like(rows[0])
            mean_of_rows(rows, mean)
            rows = mean.unsqueeze(0)
        self._cuda.copy(host.rows, rows)
        return host


class _StagedMean:
    """A pending mean in host memory, for arrays on devices; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    arrays : the arrays on devices; None for those in host memory.
    count_well : see `hpcavg.engines.base.Engine.start`.
    cuda : the calls to CUDA.

    Attributes
    ----------
    host : the mean in host memory.
    """

    host: PendingMean

    def __init__(self, arrays: list[Tensor | None], count_well: CountWell | None, cuda: Cuda) -> None:
        self._arrays, self._count_well, self._cuda = arrays, count_well, cuda
        self._num_well: int | None = None

    def count_well(self, mean: Tensor) -> int | None:
        """Return the number of learners that the other means include."""
        assert self._count_well is not None
        self._num_well = self._count_well(mean)
        return self._num_well

    @property
    def done_s(self) -> float | None:
        """End of the mean in host memory, without the copy to the device."""
        return self.host.done_s

    def test(self) -> bool:
        """See `PendingMean`."""
        return self.host.test()

    @property
    def is_complete(self) -> bool:
        """See `PendingMean`."""
        return self.host.is_complete

    def wait(self) -> list[Tensor]:
        """Return the means, each on the device of its array."""
        return self._to_devices(self.host.wait())

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Return the means, each on the device of its array, if `is_complete`; see `PendingMean`."""
        return self._to_devices(self.host.settle(True)) if is_complete else self.host.settle(False)

    def _to_devices(self, host_means: list[Tensor]) -> list[Tensor]:
        means = []
        for index, (mean, array) in enumerate(zip(host_means, self._arrays, strict=True)):
            if array is None:
                means.append(mean)
                continue
            # The host has divided a sum of the ranks' means by a number of learners.
            scaled = mean if index == 0 or self._num_well is None else mean * len(array)
            means.append(self._cuda.to_device(scaled, array.device))
        return means


def key_of(array: Tensor) -> object:
    """Return a key that identifies `array` among all existing arrays: its memory, shape and dtype."""
    return array.device, array.data_ptr(), tuple(array.shape), array.dtype
