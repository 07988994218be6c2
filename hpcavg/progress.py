"""What a person sees while a run goes on: a moving bar on a terminal, one plain line per epoch anywhere else."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Display(Protocol):
    """Follows a run."""

    def advance(self) -> None:
        """One step has been taken."""

    def line(self, text: str) -> None:
        """Show one line that stays."""

    def close(self) -> None:
        """Leave the terminal as it was."""


class _Silent:
    def advance(self) -> None:
        pass

    def line(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Plain(_Silent):
    def line(self, text: str) -> None:
        print(text, flush=True)


class _Bar:
    def __init__(self, progress: Progress, what: str, total_steps: int, step: int) -> None:
        self._progress = progress
        self._task = progress.add_task(what, total=total_steps, completed=step)
        progress.start()

    def advance(self) -> None:
        self._progress.advance(self._task)

    def line(self, text: str) -> None:
        self._progress.console.print(text, highlight=False, markup=False)

    def close(self) -> None:
        self._progress.stop()


def display(rank: int, total_steps: int, step: int = 0, what: str = "training") -> Display:
    """Return the display for this rank, of `what`, of which `step` steps are done: ranks other than 0 show nothing."""
    if rank != 0:
        return _Silent()
    if not is_terminal():
        return _Plain()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(force_terminal=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return _Bar(Progress(*columns, console=console), what, total_steps, step)


def is_terminal() -> bool:
    """Return whether standard output ends at a person's terminal.

    mpirun gives its ranks a pseudo-terminal wherever its own output goes; only a real terminal gives that one a width.
    """
    try:
        return sys.stdout.isatty() and os.get_terminal_size(sys.stdout.fileno()).columns > 0
    except (OSError, ValueError):
        return False
