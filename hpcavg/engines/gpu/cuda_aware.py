"""Device arrays with a CUDA-aware MPI: a blocking MPI_Allreduce on device memory.

Non-blocking reductions do not accept device memory; in Open MPI they crash. A delayed mean is therefore a blocking
reduction of a copy, in a separate thread and on a separate communicator.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import Neighbours, Scope
from hpcavg.distributed.topology import Topology
from hpcavg.engines.gpu.cuda import Cuda
from hpcavg.engines.mpi import MAX_CHUNK_ELEMENTS, MpiEngine
from hpcavg.engines.pending import CountWell
from hpcavg.engines.staged import average_own

# Half precision, which MPI has no type for, is converted to float32 on the device, in pieces of 16 MiB.
_SCRATCH_ELEMENTS = 4 * 2**20
# At the end of a program without `finish`, all ranks have started the last mean, and it completes soon.
_LAST_WAIT_S = 5.0


class CudaAwareEngine:
    """Means by MPI_Allreduce, in place in device or host memory. Half precision is summed in float32.

    Parameters
    ----------
    topology : the ranks.
    max_chunk_elements : maximum count of a call of MPI.
    cuda : the calls to CUDA; None for the real ones.
    """

    name = "cuda-aware"
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
        average_own(rows, out)
        self._average(self._topology.comm(scope), out, num_well)

    def mix(self, rows: Tensor, out: Tensor, scope: Neighbours) -> None:
        """Write the weighted mean of the neighbours to this rank's row, through host memory."""
        self._cuda.synchronize(rows.device)
        self._mpi.mix(rows, out, scope)

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> BlockingMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`."""
        comm = self._topology.background_comm(scope, self)
        copies = [rows.mean(dim=0) if rows.shape[0] > 1 else rows[0].clone() for rows in arrays]
        copied = [self._cuda.mark(device) for device in {copy.device for copy in copies}]

        def take() -> None:
            for mark in copied:
                if mark is not None:
                    mark.synchronize()
            num_well = None
            for index, copy in enumerate(copies):
                with self._cuda.own_stream(copy.device):
                    self._average(comm, copy, num_well)
                    if index == 0 and count_well is not None:
                        num_well = count_well(copy)

        pending = BlockingMean(take, copies)
        _blocking_thread.follow(pending)
        return pending

    def _average(self, comm: MPI.Comm, values: Tensor, num_well: int | None) -> None:
        """Replace `values` by their mean over `comm`; for `num_well`, see `hpcavg.engines.base.Engine.mean`."""
        if comm.Get_size() == 1 or values.numel() == 0:
            return
        if values.is_complex():
            values = torch.view_as_real(values).view(-1)
        is_reducible = values.dtype in (torch.float32, torch.float64)
        elements = self._max_chunk_elements if is_reducible else min(_SCRATCH_ELEMENTS, self._max_chunk_elements)
        with self._cuda.on(values.device):
            for chunk in values.split(elements):
                total = chunk if is_reducible else chunk.float()
                self._cuda.synchronize(values.device)  # MPI knows no streams
                comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)
                total.div_(comm.Get_size() if num_well is None else num_well)
                if total is not chunk:
                    chunk.copy_(total)


class BlockingMean:
    """A mean that a thread takes in blocking calls; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    take : takes the mean.
    means : the mean of every array, after `take`.

    Attributes
    ----------
    done_s : end of the mean, as `time.perf_counter`; None during the mean.
    """

    def __init__(self, take: Callable[[], None], means: list[Tensor]) -> None:
        self._take = take
        self._means = means
        self._has_ended = threading.Event()
        self.done_s: float | None = None

    def run(self) -> None:
        """Take the mean. The thread calls this."""
        self._take()
        self.done_s = time.perf_counter()
        self._has_ended.set()

    def test(self) -> bool:
        """Return whether the mean has ended."""
        return self._has_ended.is_set()

    def wait(self) -> list[Tensor]:
        """Wait for the mean and return it, for every array with shape (numel,)."""
        self._has_ended.wait()
        return self._means

    @property
    def is_complete(self) -> bool:
        """Whether the mean has ended."""
        return self.test()

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Return the mean of every array if `is_complete`, else an empty list."""
        return self._means if is_complete else []


class _BlockingThread:
    """The thread of a process that takes means in blocking calls, in the order of their starts, which all ranks share.

    An exception in it ends the job, by the hook of `hpcavg.distributed.abort`.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[BlockingMean | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def follow(self, mean: BlockingMean) -> None:
        """Let the thread take `mean`."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpcavg blocking means", daemon=True)
            self._thread.start()
        # Exit handlers run in reverse order: this one must run before communicators are freed and MPI is finalized.
        atexit.unregister(self._stop)
        atexit.register(self._stop)
        self._queue.put(mean)

    def _run(self) -> None:
        while (mean := self._queue.get()) is not None:
            mean.run()

    def _stop(self) -> None:
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join(_LAST_WAIT_S)
            self._thread = None


_blocking_thread = _BlockingThread()
