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

from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import Scope
from hpcavg.engines.gpu.allreduce import AllreduceEngine, Sum
from hpcavg.engines.inside import as_real, sum_rows
from hpcavg.engines.pending import CountWell

# At the end of a program without `finish`, all ranks have started the last mean, and it completes soon.
_LAST_WAIT_S = 5.0


class CudaAwareEngine(AllreduceEngine):
    """Means by MPI_Allreduce, in place in device or host memory. Half precision is summed in float32.

    Its parameters are those of `AllreduceEngine`.
    """

    name = "cuda-aware"

    def mean(
        self,
        rows: Tensor,
        out: Tensor,
        scope: Scope,
        num_well: int | None = None,
        exact: bool = False,
    ) -> None:
        """Write the mean over the learners in `scope` to `out`; see `hpcavg.engines.base.Engine`."""
        self._mean_by(self._sum_over, rows, out, scope, num_well)

    def _sum_over(self, scope: Scope) -> Sum:
        return self._sum_on(self._topology.comm(scope))

    def _sum_on(self, comm: MPI.Comm) -> Sum:
        def sum_up(total: Tensor) -> None:
            with self._cuda.on(total.device):
                self._cuda.synchronize(total.device)  # MPI knows no streams
                comm.Allreduce(MPI.IN_PLACE, total, MPI.SUM)

        return sum_up

    def start(
        self,
        arrays: Sequence[Tensor],
        scope: Scope,
        count_well: CountWell | None = None,
    ) -> BlockingMean:
        """Start the means of `arrays` over the learners in `scope`; see `hpcavg.engines.base.Engine`."""
        comm = self._topology.background_comm(scope, self)
        sums = [sum_rows(rows.unbind()) for rows in arrays]
        forms = [(rows.dtype, len(rows)) for rows in arrays]
        summed = [self._cuda.mark(device) for device in {total.device for total in sums}]

        def take() -> list[Tensor]:
            for mark in summed:
                if mark is not None:
                    mark.synchronize()
            num_well, means = None, []
            for total, (dtype, num_rows) in zip(sums, forms, strict=True):
                with self._cuda.own_stream(total.device):
                    values = as_real(total).unsqueeze(0)
                    self._average(values, values, self._sum_on(comm), num_well or comm.Get_size() * num_rows)
                    means.append(total.to(dtype))
                    if len(means) == 1 and count_well is not None:
                        num_well = count_well(means[0])
            return means

        pending = BlockingMean(take)
        _blocking_thread.follow(pending)
        return pending


class BlockingMean:
    """A mean that a thread takes in blocking calls; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    take : takes and returns the mean of every array.

    Attributes
    ----------
    done_s : end of the mean, as `time.perf_counter`; None during the mean.
    """

    def __init__(self, take: Callable[[], list[Tensor]]) -> None:
        self._take = take
        self._means: list[Tensor] = []
        self._has_ended = threading.Event()
        self.done_s: float | None = None

    def run(self) -> None:
        """Take the mean. The thread calls this."""
        self._means = self._take()
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
