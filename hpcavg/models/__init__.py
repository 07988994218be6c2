"""Reference networks, by name: plain torch modules for inputs of shape (channels, height, width)."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import nn

from hpcavg.errors import InputError


def mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two hidden layers of 128 rectified units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Two 3x3 convolutions of 16 and 32 channels with BatchNorm, pooled to 4x4, and one linear layer."""
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, num_classes),
    )


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def build(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a freshly initialised network; raises `InputError` for an unknown name."""
    if name not in MODELS:
        raise InputError("model", name, f"one of {', '.join(MODELS)}")
    return MODELS[name](input_shape, num_classes)
