"""Runs carried out side by side, each by a group of ranks: the heaviest first, whichever group is free."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Sequence
from typing import cast

import torch
from mpi4py import MPI

from hpcavg.distributed.waiting import wait_asleep
from hpcavg.errors import reason
from hpcavg.experiments.cache import Cache, Claim
from hpcavg.experiments.run import Run
from hpcavg.utils.progress import is_terminal
from hpcavg.utils.text import counted

# Between two looks for a run that is free, while others carry out the last ones.
_LOOK_S = 0.1
# Where there is no terminal, a line now and then.
_LINE_S = 60.0


def carry_out(runs: Sequence[Run], cache: Cache, world: MPI.Intracomm, ranks_per_run: int = 1) -> None:
    """Carry out those of `runs` that have no result in `cache`, and wait for those that another job carries out.

    Collective over `world`. A run that is finished is kept at once. A job that is killed loses no more than the runs
    under way.

    Parameters
    ----------
    runs : the same on all ranks.
    cache : where results are, and go.
    world : all ranks.
    ranks_per_run : how many ranks share the learners of a run; a divisor of the number of ranks.

    Raises
    ------
    RuntimeError
        On the ranks of a run that fails; it names the run.
    """
    torch.set_num_threads(1)
    is_first = world.Get_rank() == 0
    left: list[Run] = world.bcast(cache.missing(runs) if is_first else None)
    left.sort(key=lambda run: run.work, reverse=True)
    group = cast(MPI.Intracomm, world.Split(world.Get_rank() // ranks_per_run, world.Get_rank()))
    with _Progress(left, cache) if is_first and left else contextlib.nullcontext():
        while True:
            claim = _claim_one(left, cache) if group.Get_rank() == 0 else None
            wait_asleep(group)
            run = group.bcast(claim and claim.run)
            if run is None:
                break
            _carry_out(run, claim, cache, group)
        wait_asleep(world)
    group.Free()


def _claim_one(left: list[Run], cache: Cache) -> Claim | None:
    """Wait for a run that nobody carries out, and claim it; None if all are finished. Finished ones leave `left`."""
    while True:
        left[:] = [run for run in left if not cache.has(run)]
        for run in left:
            if claim := cache.claim(run):
                return claim
        if not left:
            return None
        time.sleep(_LOOK_S)


def _carry_out(run: Run, claim: Claim | None, cache: Cache, group: MPI.Intracomm) -> None:
    started = time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            result = run(group, cache.folder_of(run))
        if claim is not None:
            cache.put(run, result, time.monotonic() - started)
            claim.release()
    except Exception as error:  # also InputError: it is not the user's
        raise RuntimeError(f"{run} failed: {reason(error)}") from error


class _Progress:
    """In the block, a thread shows how much of the work of all groups is done, and how long the rest will take.

    The runs' own output goes nowhere meanwhile; this has the output that there was before.
    """

    def __init__(self, runs: Sequence[Run], cache: Cache) -> None:
        self._left, self._cache = list(runs), cache
        self._num_runs, self._work = len(runs), sum(run.work for run in runs)
        self._out = sys.stdout
        self._is_over = threading.Event()
        show = self._show_bar if is_terminal() else self._show_lines
        self._thread = threading.Thread(target=show, name="hpcavg progress", daemon=True)

    def __enter__(self) -> None:
        self._started = time.monotonic()
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._out, force_terminal=True)
        columns = (BarColumn(), TextColumn("{task.description}"))
        with Progress(*columns, console=console, redirect_stdout=False, redirect_stderr=False) as progress:
            task = progress.add_task("", total=self._work)
            is_over = False
            while not is_over:  # the last look is after the end
                is_over = self._is_over.wait(1)
                part, text = self._state()
                progress.update(task, completed=part * self._work, description=text)

    def _show_lines(self) -> None:
        print(f"{counted(self._num_runs, 'run')} to carry out", file=self._out, flush=True)
        while not self._is_over.wait(_LINE_S):
            print(self._state()[1], file=self._out, flush=True)

    def _state(self) -> tuple[float, str]:
        """Return the part of the work that is done, and a text that says so."""
        self._left = [run for run in self._left if not self._cache.has(run)]
        part = 1 - sum(run.work for run in self._left) / self._work
        text = f"{self._num_runs - len(self._left)} of {counted(self._num_runs, 'run')}"
        if part > 0:
            left_s = (time.monotonic() - self._started) * (1 / part - 1)
            text += f", about {left_s / 60:.0f} min left" if left_s >= 90 else f", about {left_s:.0f} s left"
        return part, text
