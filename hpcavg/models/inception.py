"""GoogLeNet, Szegedy et al. 2015, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcavg.models.layers import classifier, conv_norm_relu, initialised

# Channels of each module, the columns of table 1: 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection.
_STAGES = (
    ((64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64)),
    (
        (192, 96, 208, 16, 48, 64),
        (160, 112, 224, 24, 64, 64),
        (128, 128, 256, 24, 64, 64),
        (112, 144, 288, 32, 64, 64),
        (256, 160, 320, 32, 128, 128),
    ),
    ((256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128)),
)


class Inception(nn.Module):
    """Four parallel branches: 1x1, 3x3, 5x5 and pooling."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        one, reduce_three, three, reduce_five, five, pooled = channels
        self.branches = nn.ModuleList(
            (
                nn.Sequential(*conv_norm_relu(in_channels, one, 1)),
                nn.Sequential(*conv_norm_relu(in_channels, reduce_three, 1), *conv_norm_relu(reduce_three, three, 3)),
                nn.Sequential(*conv_norm_relu(in_channels, reduce_five, 1), *conv_norm_relu(reduce_five, five, 5)),
                nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *conv_norm_relu(in_channels, pooled, 1)),
            )
        )
        self.out_channels = one + three + five + pooled

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, out_channels, height, width)."""
        return torch.cat([branch(x) for branch in self.branches], dim=1)


def googlenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the nine Inception modules after one 3x3 convolution.

    Unlike the paper's, every convolution has BatchNorm, which makes the auxiliary classifiers superfluous; there is no
    dropout either.
    """
    channels = 192
    layers = conv_norm_relu(input_shape[0], channels, 3)
    for stage, modules in enumerate(_STAGES):
        if stage > 0:
            layers.append(nn.MaxPool2d(3, stride=2, padding=1))
        for widths in modules:
            module = Inception(channels, widths)
            layers.append(module)
            channels = module.out_channels
    return initialised(nn.Sequential(*layers, classifier(channels, num_classes)))
