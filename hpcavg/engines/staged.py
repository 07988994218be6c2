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
from hpcavg.engines.pending import CountWell


@dataclass
class _HostRow:
    """Host memory for one row of a device array.

    Attributes
    ----------
    array : the array.
    row : the memory, shape (1, numel).
    read : end of the last copy to the device, which reads the row.
    """

    array: Tensor
    row: Tensor
    read: Mark | None = None


class StagedEngine:
    """Means of device arrays on rows in host memory.

    The learners of a rank are averaged on the device first. Arrays keep their dtype, also half precision. Arrays in
    host memory are averaged by the host engine as they are.

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
        self.crossings = host.crossings
        self.compresses = host.compresses
        self._cuda = cuda or Cuda()
        self._host_rows: dict[object, _HostRow] = {}
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
        self._host_rows[key_of(array)] = _HostRow(array, row)
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
            average_own(rows, out)
        else:
            host = self._copy_out(rows)
            self._cuda.synchronize(rows.device)
            self.host.mean(host.row, host.row[0], scope, num_well, exact)
            self._cuda.copy(out, host.row[0])
            host.read = self._cuda.mark(out.device)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of the neighbours to this rank's row; see `hpcavg.engines.base.Engine`."""
        if not self._cuda.holds(rows):
            self.host.mix(rows, out, scope)
            return
        host = self._copy_out(rows)
        self._cuda.synchronize(rows.device)
        self.host.mix(host.row, host.row, scope)
        self._cuda.copy(out[0], host.row[0])
        host.read = self._cuda.mark(out.device)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> PendingMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`."""
        rows = [self._copy_out(array).row if self._cuda.holds(array) else array for array in arrays]
        for device in {array.device for array in arrays}:
            self._cuda.synchronize(device)
        devices = [array.device if self._cuda.holds(array) else None for array in arrays]
        return _StagedMean(self.host.start(rows, scope, count_well), devices, self._cuda)

    def _copy_out(self, rows: Tensor) -> _HostRow:
        """Queue the copy of the mean of this rank's learners to its row in host memory, and return the row.

        An array that is not from `allocate` gets a temporary row.
        """
        host = self._host_rows.get(key_of(rows))
        if host is None:
            host = _HostRow(rows, self._cuda.pinned(torch.empty((1, rows.shape[1]), dtype=rows.dtype, device="meta")))
        if host.read is not None:
            host.read.synchronize()  # the copy may be in another stream
        self._cuda.copy(host.row[0], rows[0] if rows.shape[0] == 1 else rows.mean(dim=0))
        return host


class _StagedMean:
    """A pending mean in host memory, for arrays on devices; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    pending : the mean in host memory.
    devices : the device of every array; None for the host.
    cuda : the calls to CUDA.
    """

    def __init__(self, pending: PendingMean, devices: list[torch.device | None], cuda: Cuda) -> None:
        self._pending, self._devices, self._cuda = pending, devices, cuda

    @property
    def done_s(self) -> float | None:
        """End of the mean in host memory, without the copy to the device."""
        return self._pending.done_s

    def test(self) -> bool:
        """See `PendingMean`."""
        return self._pending.test()

    @property
    def is_complete(self) -> bool:
        """See `PendingMean`."""
        return self._pending.is_complete

    def wait(self) -> list[Tensor]:
        """Return the means, each on the device of its array."""
        return self._to_devices(self._pending.wait())

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Return the means, each on the device of its array, if `is_complete`; see `PendingMean`."""
        return self._to_devices(self._pending.settle(True)) if is_complete else self._pending.settle(False)

    def _to_devices(self, host_means: list[Tensor]) -> list[Tensor]:
        means = zip(host_means, self._devices, strict=True)
        return [mean if device is None else self._cuda.to_device(mean, device) for mean, device in means]


def key_of(array: Tensor) -> object:
    """Return a key that identifies `array` among all existing arrays: its memory, shape and dtype."""
    return array.device, array.data_ptr(), tuple(array.shape), array.dtype


def average_own(rows: Tensor, out: Tensor) -> None:
    """Write the mean of this rank's own `rows`, shape (learners, numel), to `out`, which may be ``rows[0]``.

    Examples
    --------
    >>> rows, out = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.empty(2)
    >>> average_own(rows, out)
    >>> out
    tensor([2., 3.])
    """
    if rows.shape[0] > 1:
        out.copy_(rows.mean(dim=0))
    elif out.data_ptr() != rows.data_ptr():
        out.copy_(rows[0])
