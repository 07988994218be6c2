"""Network in Network, Lin et al. 2013, as for CIFAR-10."""

from __future__ import annotations

from torch import nn

from hpcavg.models.layers import conv_norm_relu, initialised


def nin(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return three convolutions with two 1x1 convolutions after each, and the mean of the last one's output per class.

    Dropout of one half stands between the three. Unlike the paper's, every convolution but the last has BatchNorm,
    without which K-AVG's learning rate of 1 is too large; and the last is not rectified, or all logits may become zero
    and have no gradient.
    """
    return initialised(
        nn.Sequential(
            *_mlpconv(input_shape[0], (192, 160, 96), 5),
            nn.MaxPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(0.5),
            *_mlpconv(96, (192, 192, 192), 5),
            nn.AvgPool2d(3, stride=2, ceil_mode=True),
            nn.Dropout(0.5),
            *conv_norm_relu(192, 192, 3),
            *conv_norm_relu(192, 192, 1),
            nn.Conv2d(192, num_classes, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
    )


def _mlpconv(in_channels: int, channels: tuple[int, int, int], size: int) -> list[nn.Module]:
    first, second, third = channels
    return [
        *conv_norm_relu(in_channels, first, size),
        *conv_norm_relu(first, second, 1),
        *conv_norm_relu(second, third, 1),
    ]
