"""Synthetic photographs in ImageNet's layout that can be learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError, reason, require_integer, require_number

NUM_TRAIN, NUM_VAL, NUM_CLASSES = 1_281_167, 50_000, 1000
"""The sizes of ImageNet-1K."""
_LEAST_TRAIN, _LEAST_VAL = 8, 2
_NOISE = 50


def synthesize(folder: Path, scale: float, seed: int) -> None:
    """Write synthetic JPEG files in ImageNet's layout, of about its sizes.

    A class has a grating of its own colours, direction and wavelength, under noise.

    Parameters
    ----------
    folder : Path
        A new or empty folder.
    scale : float
        The number of images, as a multiple of ImageNet-1K's. A smaller scale first means fewer images per class, down
        to 8 for training and 2 for validation, and then fewer classes, down to 2.
    seed : int
        The same seed gives the same files.

    Raises
    ------
    InputError
        The folder is not empty or cannot be written.
    """
    require_number("scale", scale, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    require_integer("seed", seed, 0, 2**63 - 1)
    train, val = counts(scale)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError("data_dir", folder, "a new or empty folder")
        for label in range(len(train)):
            name = f"n{label + 1:08d}"
            _write_class(folder / "train" / name, f"{name}_", train[label], [seed, label, 0])
            _write_class(folder / "val" / name, f"ILSVRC2012_val_{label:04d}", val[label], [seed, label, 1])
    except OSError as error:
        raise InputError("data_dir", folder, f"a folder that can be written: {reason(error)}") from error


def counts(scale: float) -> tuple[list[int], list[int]]:
    """Return the number of training and of validation images of every class."""
    total = round(scale * NUM_TRAIN)
    num_classes = min(NUM_CLASSES, max(2, total // _LEAST_TRAIN))
    train = [max(_LEAST_TRAIN, (total + label) // num_classes) for label in range(num_classes)]
    return train, [max(_LEAST_VAL, round(scale * NUM_VAL / num_classes))] * num_classes


def _write_class(folder: Path, prefix: str, num_images: int, seed: list[int]) -> None:
    from PIL import Image  # slow to import; training does not need it

    folder.mkdir(parents=True)
    for i in range(num_images):
        picture = _picture(np.random.default_rng(seed[:2]), np.random.default_rng([*seed, i]))
        Image.fromarray(picture).save(folder / f"{prefix}{i:04d}.JPEG", quality=90)


def _picture(of_class: np.random.Generator, own: np.random.Generator) -> NDArray[np.uint8]:
    """Return one picture, shape (height, width, 3): a wave between two colours, and noise."""
    first, last = of_class.integers(50, 206, (2, 3))
    palette = np.linspace(first, last, 256).astype(np.uint8)
    angle, wavelength = of_class.uniform(0, np.pi), of_class.uniform(12, 80)
    width, height = own.integers(400, 601), own.integers(300, 451)
    if own.random() < 0.3:
        width, height = height, width
    start = own.uniform(0, 2 * np.pi)
    down = np.arange(height, dtype=np.float32)[:, None] * np.float32(2 * np.pi * np.sin(angle) / wavelength)
    across = np.arange(width, dtype=np.float32) * np.float32(2 * np.pi * np.cos(angle) / wavelength)
    wave = np.cos(down + across + np.float32(start))
    shades = (127.5 + 127.5 * wave).astype(np.uint8)
    noise = np.frombuffer(own.bytes(3 * width * height), np.uint8).reshape(height, width, 3) % _NOISE
    return palette.take(shades, axis=0) + noise  # the palette leaves room for the noise
