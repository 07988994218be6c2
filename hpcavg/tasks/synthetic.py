"""Synthetic images of any shape and number of classes, for tests of size and speed. They can be learned."""

from __future__ import annotations

import numpy as np

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data.samples import Data
from hpcavg.tasks.task import Task


def task(config: Config) -> Task:
    """Return a task of ``config.num_samples`` images of ``config.image_shape`` in ``config.num_classes`` classes."""
    shape, num_classes = config.image_shape, config.num_classes
    return Task(
        "synthetic",
        lambda: models.build(config.model, shape, num_classes),
        lambda: load_data(shape, num_classes, config.num_samples, config.seed),
    )


def load_data(shape: tuple[int, ...], num_classes: int, num_samples: int, seed: int) -> Data:
    """Return images, float32: their class's pattern plus noise of the same strength. A fifth more are for testing."""
    generator = np.random.default_rng(seed)
    patterns = generator.standard_normal((num_classes, *shape), dtype=np.float32)
    num_test = -(-num_samples // 5)
    labels = generator.integers(num_classes, size=num_samples + num_test)
    images = generator.standard_normal((len(labels), *shape), dtype=np.float32)
    for start in range(0, len(labels), 1024):  # adding all patterns at once would hold the images twice
        part = slice(start, start + 1024)
        images[part] += patterns[labels[part]]
    return Data(images[:num_samples], labels[:num_samples], images[num_samples:], labels[num_samples:])
