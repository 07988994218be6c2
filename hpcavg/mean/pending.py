"""Means on their way: something must call MPI again and again, or a non-blocking reduction makes no progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from mpi4py import MPI
from torch import Tensor

# Long enough to leave the core to the computation, short against any reduction that is worth hiding.
_POLL_S = 0.0005


class Pending:
    """A mean on its way, driven by a thread of its own that sleeps between two looks at it.

    Parameters
    ----------
    requests : what must complete. collect : returns the mean's arrays once they have.

    Attributes
    ----------
    done_s : when the mean was there, on the clock of `time.perf_counter`; only to be read after `wait`.
    """

    def __init__(self, requests: Sequence[MPI.Request], collect: Callable[[], list[Tensor]]) -> None:
        self._requests = list(requests)
        self._collect = collect
        self.done_s = time.perf_counter()
        self._thread = threading.Thread(target=self._drive, name="hpcavg mean in flight")
        self._thread.start()

    def _drive(self) -> None:
        while not MPI.Request.Testall(self._requests):
            time.sleep(_POLL_S)
        self.done_s = time.perf_counter()

    def wait(self) -> list[Tensor]:
        """Return the mean of every array, shape (numel,), waiting for it where need be. To be called once."""
        self._thread.join()
        return self._collect()


class Arrived:
    """A mean that is there already, such as one that a checkpoint held."""

    def __init__(self, means: list[Tensor]) -> None:
        self._means = means
        self.done_s = time.perf_counter()

    def wait(self) -> list[Tensor]:
        """Return the mean of every array."""
        return self._means
