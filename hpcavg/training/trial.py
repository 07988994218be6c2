"""Two trial passes before the run: do the task's model, loss and data fit together?"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.tasks import Task
from hpcavg.training.evaluation import judges
from hpcavg.training.forward_backward import ForwardBackward
from hpcavg.training.loader import BatchLoader

_NOT_THE_USERS = (Path(torch.__file__).parent, Path(__file__).parents[1])


def check(config: Config, task: Task, passes: ForwardBackward, loader: BatchLoader) -> None:
    """Raise `InputError` if a pass over the shortest mini-batch of training or test samples fails, or labels are wrong.

    The shortest mini-batch may hold a single sample, which BatchNorm refuses in training. The model stays as it is.
    """
    _check_training(config, task, passes, loader)
    _check_evaluation(config, task, passes, loader)


def _check_training(config: Config, task: Task, passes: ForwardBackward, loader: BatchLoader) -> None:
    def failure(size: int) -> str | None:
        return _failure(lambda: _pass(config, task, passes, loader, size))

    size, shortest = config.run.batch_size, loader.shortest
    why = failure(shortest)
    if why is None:
        return
    if shortest < size and failure(size) is None:
        left = f"the last mini-batch of an epoch has {shortest} of a learner's {loader.share} samples"
        allowed = f"another, or given with --drop-last: {left}, and the model does not take it ({why})"
        raise InputError("batch_size", size, allowed)
    if shortest == 1 and failure(2) is None:
        raise InputError("batch_size", size, f"at least 2: the model does not take one sample alone ({why})")
    raise InputError("task", config.problem.task, f"one whose model and loss take its data: {why}")


def _check_evaluation(config: Config, task: Task, passes: ForwardBackward, loader: BatchLoader) -> None:
    judged: list[tuple[Tensor, Tensor]] = []  # empty if the learner has no test samples

    def predict() -> None:
        judged.extend(
            (passes.attempt(inputs, training=False), targets) for inputs, targets in loader.test_batches(first=-1)
        )

    def score(judge: Callable[[Tensor, Tensor], Tensor]) -> None:
        for output, targets in judged:
            float(judge(output, targets))

    stages: dict[str, Callable[[], object]] = {
        "model": predict,
        **{name: partial(score, judge) for name, judge in judges(task).items()},
    }
    for name, stage in stages.items():
        why = _failure(stage)
        if why is not None:
            raise InputError("task", config.problem.task, f"one whose {name} takes its test data: {why}")


def _failure(attempt: Callable[[], object]) -> str | None:
    """Return what `run_retryable` raises, with the place if that is in the user's own code; None if it succeeds."""
    try:
        with torch.no_grad():
            attempt()
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if not any(map(Path(frame.filename).is_relative_to, _NOT_THE_USERS))]
        where = f"{own[-1].filename}:{own[-1].lineno}: " if own else ""
        return f"{where}{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _pass(config: Config, task: Task, passes: ForwardBackward, loader: BatchLoader, size: int) -> None:
    """Pass `size` training samples through the model and the loss of training."""
    inputs, targets = loader.first(size)
    output = passes.attempt(inputs)
    _check_labels(config, task, loader, output)
    passes.loss(output, targets)


def _check_labels(config: Config, task: Task, loader: BatchLoader, output: Tensor) -> None:
    """Raise `InputError` if torch's cross_entropy would meet a label that is no class of the model."""
    is_entropy = task.loss is cross_entropy or isinstance(task.loss, nn.CrossEntropyLoss)
    if not is_entropy or output.ndim != 2:
        return
    ignored, classes = getattr(task.loss, "ignore_index", -100), output.shape[1]
    for part, labels in (("train", loader.data.train_targets), ("test", loader.data.test_targets)):
        if labels.ndim != 1:
            continue
        if labels.dtype.kind not in "iu":
            raise InputError("task", config.problem.task, f"one whose {part}_targets are integers, not {labels.dtype}")
        wrong = labels[((labels < 0) | (labels >= classes)) & (labels != ignored)]
        if len(wrong):
            allowed = f"one whose labels are 0 to {classes - 1}, for the model's {classes} outputs"
            raise InputError("task", config.problem.task, f"{allowed}; {part}_targets hold {wrong[0]}")
