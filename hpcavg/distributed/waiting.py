"""Waiting for other ranks without taking the cores from them."""

from __future__ import annotations

import time
from collections.abc import Callable

from mpi4py import MPI


def wait_asleep(comm: MPI.Comm) -> None:
    """Wait for every rank of `comm`, asleep: a busy-polling barrier would take the cores from ranks still starting."""
    complete_asleep(comm.Ibarrier(), 0.005)


def complete_asleep(request: MPI.Request, interval_s: float) -> None:
    """Wait for `request`; see `wait_until`."""
    wait_until(request.Test, interval_s)


def wait_until(is_there: Callable[[], bool], interval_s: float) -> None:
    """Call `is_there` until it is true: some dozen times at once, then asleep for `interval_s` between two looks.

    What takes microseconds is then not slept through, and what takes longer leaves the core to other ranks.
    """
    for _ in range(50):
        if is_there():
            return
    while not is_there():
        time.sleep(interval_s)
