"""Network in Network, Lin et al. 2013, as for CIFAR-10."""

from __future__ import annotations

from torch import nn

from hpcavg.models.layers import initialised


def nin(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return three convolutions, each with two of 1x1 after it, and the mean over what the last leaves per class.

    Half of the values between them are dropped. The last layer is not rectified, unlike the paper's: logits that are
    all zero have no gradient, and training ended there whatever the rate and the initial values.
    """
    return initialised(
        nn.Sequential(
            *_mlpconv(input_shape[0], (192, 160, 96), 5),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(0.5),
            *_mlpconv(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(0.5),
            *_mlpconv(192, (192, 192, num_classes), 3)[:-1],
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


def _mlpconv(in_channels: int, channels: tuple[int, int, int], size: int) -> list[nn.Module]:
    first, second, third = channels
    return [
        nn.Conv2d(in_channels, first, size, padding=size // 2),
        nn.ReLU(inplace=True),
        nn.Conv2d(first, second, 1),
        nn.ReLU(inplace=True),
        nn.Conv2d(second, third, 1),
        nn.ReLU(inplace=True),
    ]
