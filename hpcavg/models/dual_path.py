"""Dual Path Networks, Chen et al. 2017, for small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hpcavg.models.layers import classifier, conv_norm_relu, initialised, norm_relu, norm_relu_conv

_GROUPS = 32
# Of each stage: blocks, width of the 3x3 convolution, channels of the residual path, growth of the dense path.
_STAGES = ((3, 96, 256, 16), (4, 192, 512, 32), (20, 384, 1024, 24), (3, 768, 2048, 128))


class DualPathBlock(nn.Module):
    """Adds the first `residual` channels of a branch to those of the shortcut, and appends the others.

    The shortcut is the input or, in a stage's first block, a 1x1 convolution of it.
    """

    def __init__(self, in_channels: int, width: int, residual: int, growth: int, stride: int, is_first: bool) -> None:
        super().__init__()
        self.residual = residual
        self.shortcut: nn.Module = nn.Identity()
        if is_first:
            self.shortcut = nn.Sequential(*norm_relu_conv(in_channels, residual + 2 * growth, 1, stride))
        self.branch = nn.Sequential(
            *norm_relu_conv(in_channels, width, 1),
            *norm_relu_conv(width, width, 3, stride, groups=_GROUPS),
            *norm_relu_conv(width, residual + growth, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the `residual` channels and the dense path, which has `growth` channels more."""
        shortcut, branch = self.shortcut(x), self.branch(x)
        total = shortcut[:, : self.residual] + branch[:, : self.residual]
        return torch.cat((total, shortcut[:, self.residual :], branch[:, self.residual :]), dim=1)


def dpn92(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return DPN-92 (table 1) with a first convolution of 3x3 and no pooling after it."""
    layers, channels = conv_norm_relu(input_shape[0], 64, 3), 64
    for stage, (depth, width, residual, growth) in enumerate(_STAGES):
        for index in range(depth):
            stride = 2 if stage > 0 and index == 0 else 1
            layers.append(DualPathBlock(channels, width, residual, growth, stride, is_first=index == 0))
            channels = residual + (index + 3) * growth
    return initialised(nn.Sequential(*layers, *norm_relu(channels), classifier(channels, num_classes)))
