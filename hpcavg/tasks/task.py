"""What a task is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from hpcavg.data.samples import Data


def count_correct(output: Tensor, target: Tensor) -> Tensor:
    """Return how many rows of `output`, shape (batch, classes), have their maximum at `target`, shape (batch,)."""
    if target.shape != output.shape[:1]:
        raise ValueError(f"targets of shape {tuple(target.shape)} for outputs of shape {tuple(output.shape)}")
    return (output.argmax(dim=1) == target).sum()


def count_top5(output: Tensor, target: Tensor) -> Tensor:
    """Return how many rows of `output` have `target` among their five largest, shapes as in `count_correct`.

    NaN for up to ten classes, of which five would be half.
    """
    if output.shape[1] <= 10:
        return torch.tensor(math.nan)
    return (output.topk(5, dim=1).indices == target[:, None]).sum()


@dataclass(frozen=True)
class Task:
    """A learning problem.

    Attributes
    ----------
    name : used in the run's folder name and reports.
    build_model : returns the model, freshly initialised; called once on every rank, after torch has been seeded.
    load_data : returns the data; called on one rank of every node.
    loss : maps (output, target) to the mean loss over the batch, a scalar tensor.
    count_correct : maps (output, target) to the number of correct predictions; None where accuracy has no meaning. With
        the one that is there by default, top-5 accuracy is measured, too.
    transform : makes what the model takes of a batch of inputs as `load_data` gave them: a tensor on the learner's
        device, or what `Samples` returned. Training inputs come with a generator, on the CPU, of this learner and step,
        to draw augmentations from; test inputs come with None. Several threads may call it at a time. None: inputs are
        what the model takes.
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    count_correct: Callable[[Tensor, Tensor], Tensor] | None = count_correct
    transform: Callable[[Any, Generator | None], Tensor] | None = None
