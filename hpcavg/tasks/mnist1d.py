"""MNIST-1D: signals of 40 values in ten classes. Needs the Python package ``mnist1d``."""

from __future__ import annotations

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data import mnist1d
from hpcavg.data.samples import Data
from hpcavg.errors import require_integer
from hpcavg.tasks.task import Task


def task(config: Config) -> Task:
    """Return the task of ``--num-samples`` training signals, at most 40,000, and always the same 10,000 test signals.

    ``--model`` is a network for signals of 1x40.
    """
    num_samples = config.problem.num_samples
    assert num_samples is not None
    require_integer("num_samples", num_samples, 1, mnist1d.NUM_TRAIN)
    return Task(
        "mnist1d", lambda: models.build(config.problem.model, (1, mnist1d.LENGTH), 10), lambda: load_data(num_samples)
    )


def load_data(num_samples: int) -> Data:
    """Return signals of shape (n, 1, 40), float32, with labels 0..9. They are the same in every run.

    Raises `InputError` if they must be made and the package is missing.
    """
    signals, classes = mnist1d.load()
    train, test = slice(num_samples), slice(mnist1d.NUM_TRAIN, None)
    return Data(signals[train], classes[train], signals[test], classes[test])
