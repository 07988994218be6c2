"""ImageNet-1K, from the folder that ``python -m hpcavg data prepare imagenet`` writes. See docs/imagenet.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from torch import Generator, Tensor

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data import photo_augmentation, shards
from hpcavg.data.samples import Data, Samples
from hpcavg.tasks.task import Task


class Photos(shards.ShardedImages, Samples):
    """The images of one part. Every rank maps them from the shards."""


def task(config: Config) -> Task:
    """Return the task of the images in ``--data-dir``: the prepared folder, or the folder that contains it."""
    options = config.problem
    folder = shards.find(options.data_dir)
    num_classes = len(shards.read_meta(folder).classes)
    crop, augment = options.crop_size, options.augment

    def transform(photos: photo_augmentation.Photos, generator: Generator | None) -> Tensor:
        if generator is None or not augment:
            return photo_augmentation.centred(photos, crop)
        return photo_augmentation.augmented(photos, crop, generator)

    return Task(
        "imagenet",
        lambda: models.build(options.model, (3, crop, crop), num_classes),
        lambda: load_data(folder),
        transform=transform,
    )


def load_data(folder: Path) -> Data:
    """Return images, which stay in files, and labels in memory, int64. Raises `InputError` for a damaged file."""
    shards.check(folder)
    labels = {part: np.array(shards.read_index(folder / shards.index_name(part))["label"]) for part in shards.PARTS}
    return Data(Photos(folder, "train"), labels["train"], Photos(folder, "val"), labels["val"])
