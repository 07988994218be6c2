"""Scores of a model over the test set, each learner looking at its own part of it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor, nn

from hpcavg.data.partition import batches
from hpcavg.tasks import Data, Task
from hpcavg.topology import Topology

_BATCH = 1024


@dataclass(frozen=True)
class Score:
    """Mean loss and accuracy over the test samples; accuracy is NaN for a task without one."""

    loss: float
    accuracy: float


def evaluate(model: nn.Module, task: Task, data: Data, topology: Topology, to_device: Callable[[Any], Tensor]) -> Score:
    """Return the score over all learners, each with its own `model`, left in evaluation mode. Collective over them."""
    model.eval()

    def totals() -> Any:
        samples = np.arange(len(data.test_inputs))[topology.rank :: topology.num_learners]
        total_loss = total_correct = 0.0
        with torch.no_grad():
            for index in batches(samples, _BATCH):
                output = model(to_device(data.test_inputs[index]))
                targets = to_device(data.test_targets[index])
                total_loss += float(task.loss(output, targets)) * len(index)
                if task.count_correct is not None:
                    total_correct += float(task.count_correct(output, targets))
        own = np.array([total_loss, total_correct])
        topology.world.Allreduce(MPI.IN_PLACE, own)
        return own

    loss, accuracy = topology.carry_out(totals) / len(data.test_inputs)
    return Score(float(loss), float(accuracy) if task.count_correct is not None else math.nan)
