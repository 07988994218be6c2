"""Means in steps: one iterator that gets a mean done piece by piece, at once or on its way beside the computation.

MPI makes no progress by itself, so whoever waits for a mean, or one thread of the process, takes the steps.
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

# A mean as steps: yields whether the step got on, or found nothing but to wait for other ranks.
Work: TypeAlias = Iterator[bool]
# From the mean of what ranks tell of themselves, how many of them the means that come with it are of; None: of all.
CountWell: TypeAlias = Callable[[Tensor], "int | None"]

# Every look takes something from the computation, so there are no more of them than find that something has arrived.
_MIN_PAUSE_S = 0.0005
_MAX_PAUSE_S = 0.004
# A program that ends without `finish` leaves a mean that all ranks have started: it is there in no time.
_LAST_WAIT_S = 5.0
# Who has nothing else to do waits so long awake, and then in naps: other ranks may want the core.
_AWAKE_S = 0.001
_NAP_S = 0.0001


def all_done(requests: Sequence[MPI.Request]) -> Work:
    """Wait for all of `requests`."""
    while not MPI.Request.Testall(requests):
        yield False


def finish(work: Work) -> None:
    """Take all steps of `work` now."""
    last = time.perf_counter()
    for got_on in work:
        if got_on:
            last = time.perf_counter()
        elif time.perf_counter() - last > _AWAKE_S:
            time.sleep(_NAP_S)
        else:
            os.sched_yield()


class SteppedMean:
    """A mean on its way. Any thread may take its steps; only one does at a time.

    Parameters
    ----------
    work : the remaining steps.
    collect : returns the mean's arrays after them.

    Attributes
    ----------
    done_s : when the mean was there, on the clock of `time.perf_counter`; None while it is on its way.
    error : what MPI raised instead, on whichever thread; `wait` raises it.
    """

    def __init__(self, work: Work, collect: Callable[[], list[Tensor]]) -> None:
        self._work = work
        self._collect = collect
        self._lock = threading.Lock()
        self.done_s: float | None = None
        self.error: MPI.Exception | None = None
        _driver.drive(self)

    @property
    def is_complete(self) -> bool:
        """Whether the mean is there."""
        return self.done_s is not None and self.error is None

    def step(self) -> bool:
        """Take one step; return whether it got on. Nothing is left to do once `done_s` is there."""
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
        """Take one step; return whether nothing is left to do."""
        self.step()
        return self.done_s is not None

    def wait(self) -> list[Tensor]:
        """Return the mean of every array, shape (numel,), waiting for it where need be. To be called once."""
        finish(self._steps())
        if self.error is not None:
            raise self.error
        return self._collect()

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Take no more steps: return the mean where `is_complete`, as others know it to be, else nothing."""
        with self._lock:
            self.done_s = self.done_s or time.perf_counter()
        return self._collect() if is_complete else []

    def _steps(self) -> Work:
        while self.done_s is None:
            yield self.step()


class CompletedMean:
    """A mean that is there already, such as one that a checkpoint held."""

    def __init__(self, means: list[Tensor]) -> None:
        self._means = means
        self.done_s = time.perf_counter()

    is_complete = True

    def wait(self) -> list[Tensor]:
        """Return the mean of every array."""
        return self._means

    def settle(self, is_complete: bool) -> list[Tensor]:
        """Return the mean of every array where `is_complete`."""
        return self._means if is_complete else []


class _Driver:
    """The one thread that looks after means on their way, asleep between two looks and while there is none."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[SteppedMean | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: SteppedMean | None = None
        self._stopped = False

    def drive(self, pending: SteppedMean) -> None:
        """Look after `pending` until it is there."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="hpcavg means on their way", daemon=True)
            self._thread.start()
        # Last in, first out: before the communicator is freed and MPI finalised, which would tear at a mean in flight.
        atexit.unregister(self._stop)
        atexit.register(self._stop)
        self._last = pending
        self._queue.put(pending)

    def _run(self) -> None:
        while self._look_after(self._queue.get()):
            pass

    def _look_after(self, pending: SteppedMean | None) -> bool:
        """Take the steps of `pending`; return whether there is another to wait for. Keeps no hold of its arrays."""
        if pending is None:
            return False
        pause_s = _MIN_PAUSE_S
        while not self._stopped and pending.done_s is None:
            if pending.step():
                pause_s = max(pause_s / 2, _MIN_PAUSE_S)
            else:
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _MAX_PAUSE_S)
        if self._last is pending:
            self._last = None
        return True

    def _stop(self) -> None:
        deadline = time.monotonic() + _LAST_WAIT_S
        while (last := self._last) is not None and not last.test() and time.monotonic() < deadline:
            time.sleep(_MIN_PAUSE_S)
        self._stopped = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()


_driver = _Driver()
