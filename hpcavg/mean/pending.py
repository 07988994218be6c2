"""Means on their way: something must call MPI again and again, or a non-blocking reduction makes no progress."""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence

from mpi4py import MPI
from torch import Tensor

from hpcavg.topology import wait_until

# Long enough to leave the core to the computation, short against any reduction that is worth hiding.
_POLL_S = 0.0005
# A program that ends without `finish` leaves a mean that all ranks have started: it is there in no time.
_LAST_WAIT_S = 5.0


class Pending:
    """A mean on its way. Any thread may look after it; only one does at a time.

    Parameters
    ----------
    requests : what must complete. collect : returns the mean's arrays once they have.

    Attributes
    ----------
    done_s : when the mean was there, on the clock of `time.perf_counter`; None while it is on its way.
    """

    def __init__(self, requests: Sequence[MPI.Request], collect: Callable[[], list[Tensor]]) -> None:
        self._requests = list(requests)
        self._collect = collect
        self._lock = threading.Lock()
        self.done_s: float | None = None
        _driver.drive(self)

    def test(self) -> bool:
        """Let MPI make progress; return whether the mean is there."""
        with self._lock:
            if self.done_s is None and MPI.Request.Testall(self._requests):
                self.done_s = time.perf_counter()
        return self.done_s is not None

    def wait(self) -> list[Tensor]:
        """Return the mean of every array, shape (numel,), waiting for it where need be. To be called once."""
        wait_until(self.test, _POLL_S / 10)
        return self._collect()


class Arrived:
    """A mean that is there already, such as one that a checkpoint held."""

    def __init__(self, means: list[Tensor]) -> None:
        self._means = means
        self.done_s = time.perf_counter()

    def wait(self) -> list[Tensor]:
        """Return the mean of every array."""
        return self._means


class _Driver:
    """The one thread that looks after means on their way, asleep between two looks and while there is none."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Pending | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: Pending | None = None
        self._stopped = False

    def drive(self, pending: Pending) -> None:
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
        while (pending := self._queue.get()) is not None:
            while not self._stopped and not pending.test():
                time.sleep(_POLL_S)

    def _stop(self) -> None:
        deadline = time.monotonic() + _LAST_WAIT_S
        while self._last is not None and not self._last.test() and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._stopped = True
        self._queue.put(None)
        if self._thread is not None:
            self._thread.join()


_driver = _Driver()
