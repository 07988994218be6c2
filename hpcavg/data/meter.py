"""How far a long piece of work on a file has come: a moving bar on a terminal, a line every tenth anywhere else."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from hpcavg.progress import is_terminal

if TYPE_CHECKING:
    from rich.progress import Progress


class Meter:
    """Shows how many of `total_bytes` are done. A context: the terminal is left as it was."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total_bytes = what, max(total_bytes, 1)
        self._started, self._tenths = time.monotonic(), 0
        self._bar: Progress | None = None

    def __enter__(self) -> Meter:
        if is_terminal():
            from rich import progress

            columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn())
            more = (progress.TransferSpeedColumn(), progress.TimeRemainingColumn())
            self._bar = progress.Progress(*columns, *more)
            self._bar.add_task(self._what, total=self._total_bytes)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, num_bytes: int) -> None:
        """Tell that `num_bytes` are done, of all."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=num_bytes)
            return
        tenths = 10 * num_bytes // self._total_bytes
        if tenths > self._tenths:
            self._tenths = tenths
            rate = num_bytes / max(time.monotonic() - self._started, 1e-9) / 1e6
            print(f"{self._what}: {tenths * 10} % of {self._total_bytes / 1e6:,.1f} MB, {rate:.1f} MB/s", flush=True)
