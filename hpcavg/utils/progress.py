"""Progress of long work: a bar on a terminal, and lines now and then elsewhere."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Display(Protocol):
    """Shows the progress of a run or of other long work."""

    def advance(self, amount: int = 1) -> None:
        """Add `amount` steps or bytes to what is done."""

    def line(self, text: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """Restore the terminal."""


class _Silent:
    def advance(self, amount: int = 1) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Plain(_Silent):
    def line(self, text: str) -> None:
        print(text, flush=True)


class _Tenths(_Plain):
    """Shows a line for every tenth of the bytes."""

    def __init__(self, what: str, num_bytes: int) -> None:
        self._what, self._num_bytes, self._done = what, max(num_bytes, 1), 0
        self._started = time.monotonic()

    def advance(self, amount: int = 1) -> None:
        tenths, self._done = 10 * self._done // self._num_bytes, self._done + amount
        if 10 * self._done // self._num_bytes > tenths:
            rate = self._done / max(time.monotonic() - self._started, 1e-9) / 1e6
            percent, size = 10 * self._done // self._num_bytes * 10, self._num_bytes / 1e6
            self.line(f"{self._what}: {percent} % of {size:,.1f} MB, {rate:.1f} MB/s")


class _Bar:
    def __init__(self, progress: Progress, what: str, total: int, done: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total, completed=done)
        progress.start()

    def advance(self, amount: int = 1) -> None:
        self._progress.advance(self._task, amount)

    def line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def display(rank: int, total: int, done: int = 0, what: str = "training", in_bytes: bool = False) -> Display:
    """Return the display for this rank. Ranks other than 0 show nothing.

    Parameters
    ----------
    rank : int
        This rank.
    total : int
        All steps or bytes of the work.
    done : int
        The steps or bytes that are done already.
    what : str
        The name of the work.
    in_bytes : bool
        The work is counted in bytes, not steps.
    """
    if rank != 0:
        return _Silent()
    if not is_terminal():
        return _Tenths(what, total) if in_bytes else _Plain()
    from rich import progress
    from rich.console import Console

    kinds = (progress.DownloadColumn, progress.TransferSpeedColumn) if in_bytes else (progress.MofNCompleteColumn,)
    columns = [kind() for kind in (progress.BarColumn, *kinds, progress.TimeRemainingColumn)]
    shown = progress.Progress("{task.description}", *columns, console=Console(force_terminal=True))
    return _Bar(shown, what, total, done)


def is_terminal() -> bool:
    """Return whether standard output goes to a terminal.

    mpirun gives its ranks a pseudo-terminal in any case. It has a width only if mpirun itself has a terminal.
    """
    try:
        return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False
