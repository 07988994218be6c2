"""Handwritten digits: 1797 images of 8x8 pixels, part of scikit-learn (UCI, Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import numpy as np

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data.samples import Data
from hpcavg.tasks.task import Task

# 1440 samples divide evenly over every number of learners up to 6, and over 8, 9, 10, 12, 16, 18, 20, 24, 32, ...
NUM_TRAIN = 1440
_SPLIT_SEED = 1998


def task(config: Config) -> Task:
    """Return the task. ``--model`` is a network for images of 1x8x8."""
    return Task("digits", lambda: models.build(config.problem.model, (1, 8, 8), 10), load_data)


def load_data() -> Data:
    """Return images of shape (n, 1, 8, 8) in 0..1, float32, with labels 0..9. The split is the same in every run."""
    from sklearn.datasets import load_digits  # takes seconds to import, and one rank per node needs it

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return Data(images[train], labels[train], images[test], labels[test])
