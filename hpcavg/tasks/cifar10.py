"""CIFAR-10, from the files of its binary or Python version."""

from __future__ import annotations

import functools
from pathlib import Path

import torch
from torch import Generator, Tensor

from hpcavg import models
from hpcavg.config.options import Config
from hpcavg.data import cifar10
from hpcavg.data.augmentation import crop_and_flip
from hpcavg.data.samples import Data
from hpcavg.errors import InputError, reading
from hpcavg.tasks.task import Task

# Mean and deviation of the original's training images, per channel, as parts of 255.
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
PADDING = 4


def task(config: Config) -> Task:
    """Return the task. ``--data-dir`` holds the files; ``--augment`` crops and flips training images."""
    options = config.problem
    return Task(
        "cifar10",
        lambda: models.build(options.model, cifar10.SHAPE, cifar10.NUM_CLASSES),
        lambda: load_data(options.data_dir),
        transform=functools.partial(transform, augment=options.augment),
    )


def load_data(folder: str | None) -> Data:
    """Return images of shape (n, 3, 32, 32), uint8, with labels 0..9. Raises `InputError` if a file cannot be read."""
    if folder is None:
        where = f"a folder with {' or '.join(cifar10.FOLDERS.values())}, from {cifar10.WHERE}"
        raise InputError("data_dir", "unset", f"{where}; python -m hpcavg data synthesize cifar10 writes such files")
    with reading("data_dir", folder):
        return Data(*cifar10.load(Path(folder)))


def transform(images: Tensor, generator: Generator | None, augment: bool = True) -> Tensor:
    """Return images as float32, with mean 0 and deviation 1 in every channel.

    Parameters
    ----------
    images : shape (n, 3, 32, 32), uint8.
    generator : draws crops and flips. None for test images, which stay as they are.
    augment : crop and flip training images.
    """
    if augment and generator is not None:
        images = crop_and_flip(images, PADDING, generator)
    scale, shift = _normalisation(images.device)
    return images.to(torch.float32).mul_(scale).add_(shift)


@functools.cache
def _normalisation(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return scale and shift for pixels 0..255, each of shape (3, 1, 1)."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return 1 / (255 * std), -mean / std
