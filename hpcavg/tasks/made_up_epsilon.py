"""Made-up samples of epsilon's form: 2000 features and two classes. They need no files and little memory."""

from __future__ import annotations

import numpy as np

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data import epsilon
from hpcavg.data.samples import Data
from hpcavg.tasks.task import Task

NUM_TEST = 1000
_SEED = 2008


def task(config: Config) -> Task:
    """Return the task of ``--num-samples`` training samples, and always the same test samples."""
    num_samples = config.problem.num_samples
    assert num_samples is not None
    return Task(
        "made-up-epsilon",
        lambda: models.build(config.problem.model, (epsilon.NUM_FEATURES,), 2),
        lambda: load_data(num_samples),
    )


def load_data(num_samples: int) -> Data:
    """Return inputs of shape (n, 2000), float32, with targets 0 and 1: those of ``data synthesize epsilon`` in memory.

    They are the same in every run, and with fewer training samples the first ones.
    """
    generator = np.random.default_rng(_SEED)
    normal = epsilon.draw_plane(generator)
    total = NUM_TEST + num_samples
    inputs, targets = np.empty((total, epsilon.NUM_FEATURES), np.float32), np.empty(total, np.int64)
    for i, (label, row) in enumerate(epsilon.draw_samples(total, normal, generator)):
        inputs[i], targets[i] = row, label > 0
    train, test = slice(NUM_TEST, None), slice(NUM_TEST)  # the test samples come first: they never change
    return Data(inputs[train], targets[train], inputs[test], targets[test])
