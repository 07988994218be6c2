"""The class `Task` and its default measures."""

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
    """Return the number of rows of `output` whose largest value is at `target`.

    Parameters
    ----------
    output : shape (batch, classes).
    target : shape (batch,), integer.
    """
    if target.shape != output.shape[:1]:
        raise ValueError(f"targets of shape {tuple(target.shape)} for outputs of shape {tuple(output.shape)}")
    return (output.argmax(dim=1) == target).sum()


def count_top5(output: Tensor, target: Tensor) -> Tensor:
    """Return the number of rows of `output` with `target` among their five largest values.

    Shapes are those of `count_correct`. With ten classes or fewer, five are half of them and the result is NaN.
    """
    if output.shape[1] <= 10:
        return torch.tensor(math.nan)
    return (output.topk(5, dim=1).indices == target[:, None]).sum()


@dataclass(frozen=True)
class Task:
    """A learning problem.

    Attributes
    ----------
    name : used in the name of the run's folder and in reports.
    build_model : returns a new model. Called once on every rank, after torch has been seeded.
    load_data : returns the data. Called on one rank of every node.
    loss : maps (output, target) to the mean loss over the batch, a scalar tensor.
    count_correct : maps (output, target) to the number of correct predictions. None: accuracy has no meaning. With the
        default, top-5 accuracy is measured, too.
    transform : maps a batch of inputs and a generator to the model's input. The batch is a tensor on the learner's
        device, or what `Samples` returned. For training inputs, the generator is on the CPU and belongs to this learner
        and step; it draws augmentations. For test inputs it is None. Several threads may call it at the same time.
        None: the model takes inputs as `load_data` returned them.

    Examples
    --------
    >>> import numpy as np
    >>> from torch import nn
    >>> x, y = np.ones((8, 3), np.float32), np.zeros(8, np.int64)
    >>> task = Task("ones", lambda: nn.Linear(3, 2), lambda: Data(x, y, x, y))
    >>> task.name, task.count_correct is count_correct
    ('ones', True)
    """

    name: str
    build_model: Callable[[], nn.Module]
    load_data: Callable[[], Data]
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy
    count_correct: Callable[[Tensor, Tensor], Tensor] | None = count_correct
    transform: Callable[[Any, Generator | None], Tensor] | None = None
