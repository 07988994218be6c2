"""DenseNet, Huang et al. 2017, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcavg.models.layers import classifier, conv, initialised, norm_relu, norm_relu_conv

_GROWTH = 32
_DEPTHS = (6, 12, 24, 16)


class DenseLayer(nn.Module):
    """Adds `_GROWTH` channels to the input: the output of a 1x1 and a 3x3 convolution of it."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        width = 4 * _GROWTH
        self.branch = nn.Sequential(*norm_relu_conv(in_channels, width, 1), *norm_relu_conv(width, _GROWTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, channels + growth, height, width)."""
        return torch.cat((x, self.branch(x)), dim=1)


def densenet121(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return DenseNet-121 (table 1) with a first convolution of 3x3 and no pooling after it."""
    channels = 2 * _GROWTH
    layers: list[nn.Module] = [conv(input_shape[0], channels, 3)]
    for block, depth in enumerate(_DEPTHS):
        if block > 0:  # a transition: half of the channels, a quarter of the pixels
            layers += [*norm_relu_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels))
            channels += _GROWTH
    return initialised(nn.Sequential(*layers, *norm_relu(channels), classifier(channels, num_classes)))
