"""Processes of this host: their start and whether they still run."""

from __future__ import annotations

import os
import time


def started_ticks(pid: int) -> int:
    """Return the start of process `pid`, in clock ticks since the host started.

    The start distinguishes processes that get the same number one after the other. Raises `OSError` if there is no
    such process.
    """
    return _state_and_start(pid)[1]


def process_age_s() -> float:
    """Return the seconds since this process started, with the start of the interpreter and imports."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def is_running(pid: int, ticks: int) -> bool | None:
    """Return whether process `pid` that started at `ticks` still runs; None if this cannot be found out.

    Examples
    --------
    >>> is_running(os.getpid(), started_ticks(os.getpid()))
    True
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process, which /proc may hide
        pass
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return None
    return state not in ("Z", "X") and started == ticks  # a process that has ended may stay a zombie for long


def _state_and_start(pid: int) -> tuple[str, int]:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], int(fields[19])
