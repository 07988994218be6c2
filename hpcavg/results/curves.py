"""The curves of runs, read from their metrics by another process: HDF5 may crash or hang on a damaged file."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import reason
from hpcavg.results.columns import COLUMNS
from hpcavg.results.summary import FIELDS
from hpcavg.results.view import file_name, rank_files, read_attributes, read_view

DEADLINE_S = 120.0
_POINTS = 200
# What evaluations record and summaries hold.
_SCORES = COLUMNS["evaluation"].keys() & FIELDS.keys()


@dataclass(frozen=True)
class Curves:
    """What is drawn of a run.

    Parameters
    ----------
    known : mapping
        Fields of its summary that the metrics contain, those of the last evaluation included.
    step : array of shape (points,)
        Steps.
    loss : array of shape (points,)
        Training loss at these steps, mean over the learners.
    epoch : array of shape (epochs,)
        Epochs.
    test_loss : array of shape (epochs,)
        Test loss of the mean model.
    test_accuracy : array of shape (epochs,)
        Test accuracy of the mean model.
    """

    known: Mapping[str, Any]
    step: NDArray[Any]
    loss: NDArray[Any]
    epoch: NDArray[Any]
    test_loss: NDArray[Any]
    test_accuracy: NDArray[Any]


def read(folders: Sequence[Path]) -> list[Curves | str]:
    """Return, for each of `folders`, the curves of its run, or in one line why they cannot be read."""
    found: list[Curves | str] = []
    context = multiprocessing.get_context("spawn")
    while len(found) < len(folders):  # a new process for the runs after one that crashed the last process
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_send_all, args=(sender, folders[len(found) :]), daemon=True)
        process.start()
        sender.close()
        try:
            while len(found) < len(folders):
                if not receiver.poll(DEADLINE_S):
                    found.append(f"its metrics cannot be read within {DEADLINE_S:.0f} s: damaged, or too many")
                    break
                found.append(receiver.recv())
        except EOFError:
            found.append("its metrics are damaged: reading them crashes HDF5")
        finally:
            process.kill()
            process.join()
            receiver.close()
    return found


def _send_all(sender: Connection, folders: Sequence[Path]) -> None:
    """Send the curves of each of `folders`, or why there are none. What a crash prints is discarded."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    for folder in folders:
        sender.send(_read_or_reason(folder / "metrics"))


def _read_or_reason(metrics: Path) -> Curves | str:
    try:
        return _read(metrics)
    except Exception as error:  # HDF5's come as OSError, RuntimeError, ValueError and KeyError
        name = getattr(error, "filename", None)
        return f"its metrics cannot be read: {f'{Path(name).name}: ' if name else ''}{reason(error)}"


def _read(metrics: Path) -> Curves:
    steps, evaluations = read_view(metrics, "step"), read_view(metrics, "evaluation")
    step, loss = _smoothed(steps["step"], steps["loss"])
    # Every learner records the same; one that left early has fewer rows.
    times = evaluations["epoch"] >= 0
    shown = {name: values[times.sum(axis=1).argmax()] for name, values in evaluations.items()}
    known = {"steps": int(steps["step"].max(initial=0)), **_about(metrics)}
    if times.any():
        last = np.flatnonzero(shown["epoch"] >= 0)[-1]
        known |= {name: float(values[last]) for name, values in shown.items() if name in _SCORES}
    return Curves(known, step, loss, shown["epoch"], shown["test_loss"], shown["test_accuracy"])


def _about(metrics: Path) -> dict[str, Any]:
    """Return the attributes of the run, from the first file that can be read."""
    for rank, segment in rank_files(metrics):
        with suppress(Exception):
            about = read_attributes(metrics / file_name(rank, segment))
            names = {"algorithm": str, "task": str, "num_learners": int}
            return {name: kind(about[name]) for name, kind in names.items()}
    return {}


def _smoothed(step: NDArray[Any], loss: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return steps and the mean loss of all learners, averaged over short spans. Missing rows do not count."""
    values = np.ma.masked_invalid(loss).mean(axis=0)
    width = max(1, len(values) // _POINTS)
    usable = len(values) // width * width
    position = step.max(axis=0)[:usable].reshape(-1, width).mean(axis=1)
    return position, values[:usable].reshape(-1, width).mean(axis=1).filled(np.nan)
