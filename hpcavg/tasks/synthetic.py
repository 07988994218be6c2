"""Synthetic images of any shape and number of classes, for tests of size and speed. A network can learn them."""

from __future__ import annotations

import numpy as np

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data.samples import Data
from hpcavg.tasks.task import Task


def task(config: Config) -> Task:
    """Return a task of ``--num-samples`` training images of ``--image-shape`` in ``--num-classes`` classes."""
    options = config.problem
    shape, num_classes, num_samples = options.image_shape, options.num_classes, options.num_samples
    assert num_samples is not None
    return Task(
        "synthetic",
        lambda: models.build(options.model, shape, num_classes),
        lambda: load_data(shape, num_classes, num_samples, config.run.seed),
    )


def load_data(shape: tuple[int, ...], num_classes: int, num_samples: int, seed: int) -> Data:
    """Return images, float32: the pattern of their class plus noise of the same strength.

    Parameters
    ----------
    shape : channels, height and width of an image.
    num_classes : number of classes, which have a pattern each.
    num_samples : training images. A fifth as many test images follow them.
    seed : of patterns, labels and noise.
    """
    generator = np.random.default_rng(seed)
    patterns = generator.standard_normal((num_classes, *shape), dtype=np.float32)
    num_test = -(-num_samples // 5)
    labels = generator.integers(num_classes, size=num_samples + num_test)
    images = generator.standard_normal((len(labels), *shape), dtype=np.float32)
    for start in range(0, len(labels), 1024):  # adding all patterns at once would hold the images twice
        part = slice(start, start + 1024)
        images[part] += patterns[labels[part]]
    return Data(images[:num_samples], labels[:num_samples], images[num_samples:], labels[num_samples:])
