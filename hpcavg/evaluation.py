"""Scores of a model over the test set, each learner looking at its own part of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.tasks import Task
from hpcavg.topology import Topology


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy over the test samples; accuracy is NaN for a task without one."""

    loss: float
    accuracy: float


def evaluate(
    predict: Callable[[Tensor], Tensor], task: Task, test_batches: Callable[[], Iterable[Any]], topology: Topology
) -> Score:
    """Return the score over all learners, each with its own model and test batches. Collective over them.

    `predict` maps inputs to outputs. Every batch is a pair of inputs and targets.
    """

    def totals() -> Any:
        num_samples, total_loss, total_correct = 0, 0.0, 0.0
        with torch.no_grad():
            for inputs, targets in test_batches():
                output = predict(inputs)
                num_samples += len(targets)
                total_loss += float(task.loss(output, targets)) * len(targets)
                if task.count_correct is not None:
                    total_correct += float(task.count_correct(output, targets))
        own = np.array([total_loss, total_correct, num_samples])
        topology.world.Allreduce(MPI.IN_PLACE, own)
        return own

    loss, correct, num_samples = topology.carry_out(totals)
    return Score(
        float(loss / num_samples), float(correct / num_samples) if task.count_correct is not None else math.nan
    )
