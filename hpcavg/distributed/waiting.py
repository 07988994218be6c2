"""Waiting for other ranks without occupying a core: ranks may share cores."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi4py import MPI


def wait_asleep(comm: MPI.Comm) -> None:
    """Wait for every rank of `comm`, asleep. A barrier polls, and slows ranks that are still starting."""
    complete_asleep(comm.Ibarrier(), 0.005)


def complete_asleep(request: MPI.Request, interval_s: float) -> None:
    """Wait for `request`; see `wait_until`."""
    wait_until(request.Test, interval_s)


def wait_until(condition: Callable[[], bool], interval_s: float) -> None:
    """Poll until `condition` returns true: 50 times at once, then every `interval_s` seconds.

    The first polls catch what takes microseconds. The sleep then leaves the core to other ranks.

    Examples
    --------
    >>> left = [1, 2, 3]
    >>> wait_until(lambda: left.pop() == 1, interval_s=0.005)
    >>> left
    []
    """
    for _ in range(50):
        if condition():
            return
    while not condition():
        time.sleep(interval_s)
