"""Scores of a model over the test set. Each learner evaluates its own part."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.distributed.topology import Topology
from hpcavg.tasks import Task, count_correct, count_top5


@dataclass(frozen=True)
class Score:
    """Means over the test samples.

    Parameters
    ----------
    loss : float
        The test loss.
    accuracy : float
        The test accuracy; NaN for a task without it.
    top5_accuracy : float
        The top-5 accuracy; NaN for a task without it.
    """

    loss: float
    accuracy: float
    top5_accuracy: float = math.nan


@dataclass(frozen=True)
class Evaluation:
    """How the models do at the end of an epoch.

    Parameters
    ----------
    step : int
        Steps of this learner so far.
    epoch : int
        Epochs so far.
    train_loss : float
        Training loss of the epoch, mean over the learners.
    mean : Score
        Of the mean model.
    learners : Score
        Of the learners' own models, each on its part of the test set.
    """

    step: int
    epoch: int
    train_loss: float
    mean: Score
    learners: Score


def evaluate(
    outputs: Callable[[], Iterable[tuple[Tensor, Tensor]]], task: Task, topology: Topology, what: str = "evaluation"
) -> Score:
    """Return the score over the test samples of all ranks. Collective over the learners.

    Parameters
    ----------
    outputs : callable
        Returns pairs of outputs and targets, for this rank's test samples.
    task : Task
        Its loss and accuracy.
    topology : Topology
        The learners.
    what : str
        Names the evaluation in watchdog reports.
    """
    all_judges = judges(task).values()

    def totals() -> Any:
        own = np.zeros(4)
        with torch.no_grad():
            for output, targets in outputs():
                loss, *counts = (float(judge(output, targets)) for judge in all_judges)
                own += loss * len(targets), *counts, len(targets)
        topology.learner_ranks.Allreduce(MPI.IN_PLACE, own)
        return own

    *sums, num_samples = topology.run_collective(totals, what=what).tolist()
    return Score(*(total / num_samples for total in sums))


def judges(task: Task) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return the functions of a batch's output and targets: the mean loss, and counts of correct ones (NaN if none)."""
    count = task.count_correct or _nothing_to_count
    top5 = count_top5 if count is count_correct else _nothing_to_count
    return {"loss": task.loss, "count_correct": count, "count_top5": top5}


def _nothing_to_count(output: Tensor, target: Tensor) -> Tensor:
    return torch.tensor(math.nan)
