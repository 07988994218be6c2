"""Means in steps: one iterator does a mean piece by piece, blocking or in the background.

MPI makes no progress by itself. A caller that waits for a mean takes its steps; otherwise a thread of the process does.
"""

from __future__ import annotations

import atexit
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeAlias

from mpi4py import MPI
from torch import Tensor

Work: TypeAlias = Iterator[bool]
"""The steps of a mean. Each yields whether it made progress; if not, it waits for other ranks."""

CountWell: TypeAlias = Callable[[Tensor], "int | None"]
"""Returns the number of learners that a mean includes, from the mean of their health; None for all."""

# Polling slows the computation. The sleep between polls grows while nothing arrives.
_MIN_SLEEP_S = 0.0005
_MAX_SLEEP_S = 0.004
# At the end of a program without `finish`, all ranks have started the last mean, and it completes soon.
_LAST_WAIT_S = 5.0
# A blocking wait first polls without sleep, then with it: other ranks may need the core.
_BUSY_S = 0.001
_WAIT_SLEEP_S = 0.0001


def all_done(requests: Sequence[MPI.Request]) -> Work:
    """Wait for all of `requests`, in steps."""
    while not MPI.Request.Testall(requests):
        yield False


def finish(work: Work) -> None:
    """Take all steps of `work` now."""
    last = time.perf_counter()
    for has_progressed in work:
        if has_progressed:
            last = time.perf_counter()
        elif time.perf_counter() - last > _BUSY_S:
            time.sleep(_WAIT_SLEEP_S)
        else:
            os.sched_yield()


class SteppedMean:
    """A mean in progress that any thread may advance, one at a time; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    work : the remaining steps.
    collect : returns the mean of every array after them.

    Attributes
    ----------
    done_s : end of the mean, as `time.perf_counter`; None during the mean.
    error : the exception that MPI raised during a step; `wait` raises it again.
    """

    def __init__(self, work: Work, collect: Callable[[], list[Tensor]]) -> None:
        self._work = work
        self._collect = collect
        self._lock = threading.Lock()
        self.done_s: float | None = None
        self.error: MPI.Exception | None = None
        _progress_thread.follow(self)

    @property
    def is_complete(self) -> bool:
        """Whether the mean has ended without an exception of MPI."""
        return self.done_s is not None and self.error is None

    def step(self) -> bool:
        """Take one step, unless the mean has ended; return whether it made progress."""
        with self._lock:
            if self.done_s is not None:
                return False
            try:
                return next(self._work)
            except StopIteration:
                pass
            except MPI.Exception as error:
                self.error = error
            self.done_s = time.perf_counter()
            return True

    def test(self) -> bool:
        """Take one step; return whether the mean has ended."""
        self.step()
        return self.done_s is not None

    def wait(self) -> list[Tensor]:
        """Wait for the mean and return it, for every array with shape (numel,). Call this once."""
        finish(self._steps())
        if self.error is not None:
            raise self.error
        return self._collect()

    def settle(self, is_complete: bool) -> list[Tensor]:
        """End the mean after a death of ranks; see `hpcavg.engines.base.PendingMean`."""
        with self._lock:
            self.done_s = self.done_s or time.perf_counter()
        return self._collect() if is_complete else []

    def _steps(self) -> Work:
        while self.done_s is None:
            yield self.step()


class CompletedMean:
    """A mean that has ended, such as one from a checkpoint; see `hpcavg.engines.base.PendingMean`.

    Parameters
    ----------
    means : the mean of every array.

    Attributes
    ----------
    done_s : the time now, as `time.perf_counter`.
    is_complete : true.
    """

    def __init__(self, means: list[Tensor]) -> None:
        self._means = means
        self.done_s = time.perf_counter()

    is_complete = True

    def wait(self) -> list[Tensor]:
        """Return the mean of every array."""
        return self._means

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Return the mean of every array if `is_complete`, else an empty list."""
        return self._means if is_complete else []


class _ProgressThread:
    """The thread of a process that advances means in the background. It sleeps between polls and without a mean."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[SteppedMean | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: SteppedMean | None = None
        self._stopped = False

    def follow(self, mean: SteppedMean) -> None:
        """Advance `mean` until it ends."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpcavg means in progress", daemon=True)
            self._thread.start()
        # Exit handlers run in reverse order: this one must run before communicators are freed and MPI is finalized.
        atexit.unregister(self._stop)
        atexit.register(self._stop)
        self._last = mean
        self._queue.put(mean)

    def _run(self) -> None:
        while self._complete(self._queue.get()):
            pass

    def _complete(self, mean: SteppedMean | None) -> bool:
        """Take the steps of `mean`; return False for None, which ends the thread. Keeps no reference to the mean."""
        if mean is None:
            return False
        sleep_s = _MIN_SLEEP_S
        while not self._stopped and mean.done_s is None:
            if mean.step():
                sleep_s = max(sleep_s / 2, _MIN_SLEEP_S)
            else:
                time.sleep(sleep_s)
                sleep_s = min(2 * sleep_s, _MAX_SLEEP_S)
        if self._last is mean:
            self._last = None
        return True

    def _stop(self) -> None:
        """Complete the last mean, if it takes seconds at most, and end the thread."""
        deadline = time.monotonic() + _LAST_WAIT_S
        while (last := self._last) is not None and not last.test() and time.monotonic() < deadline:
            time.sleep(_MIN_SLEEP_S)
        self._stopped = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()


_progress_thread = _ProgressThread()
