"""MobileNet, Howard et al. 2017, and MobileNetV2, Sandler et al. 2018, of width 1, for small images."""

from __future__ import annotations

from torch import Tensor, nn

from hpcavg.models.layers import classifier, conv_norm, conv_norm_relu, initialised

# Channels and stride of each depthwise separable convolution (Howard et al., table 1).
_SEPARABLE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *5 * ((512, 1),), (1024, 2), (1024, 1))


def mobilenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return MobileNet. Its first convolution has stride 1, not 2."""
    layers, in_channels = conv_norm_relu(input_shape[0], 32, 3), 32
    for channels, stride in _SEPARABLE:
        layers += conv_norm_relu(in_channels, in_channels, 3, stride, groups=in_channels)
        layers += conv_norm_relu(in_channels, channels, 1)
        in_channels = channels
    return initialised(nn.Sequential(*layers, classifier(in_channels, num_classes)))


class InvertedResidual(nn.Module):
    """Expands the channels, filters each, and projects them back linearly; adds the input if shapes agree."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = expansion * in_channels
        layers = [] if expansion == 1 else _conv_norm_relu6(in_channels, width, 1)
        layers += _conv_norm_relu6(width, width, 3, stride, groups=width)
        self.branch = nn.Sequential(*layers, *conv_norm(width, out_channels, 1))
        self.adds_input = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, out_channels, height / stride, width / stride)."""
        return x + self.branch(x) if self.adds_input else self.branch(x)


def mobilenetv2(input_shape: tuple[int, ...], num_classes: int, early_stride: int = 1) -> nn.Module:
    """Return MobileNetV2.

    `early_stride` is the stride of the first convolution and of the second stage. It is 2 in the paper, for ImageNet.
    """
    stages = (  # expansion, channels, blocks and stride of each (Sandler et al., table 2)
        (1, 16, 1, 1),
        (6, 24, 2, early_stride),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
    layers, in_channels = _conv_norm_relu6(input_shape[0], 32, 3, early_stride), 32
    for expansion, channels, depth, stride in stages:
        for index in range(depth):
            layers.append(InvertedResidual(in_channels, channels, stride if index == 0 else 1, expansion))
            in_channels = channels
    layers += _conv_norm_relu6(in_channels, 1280, 1)
    return initialised(nn.Sequential(*layers, classifier(1280, num_classes)))


def _conv_norm_relu6(
    in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    return [*conv_norm(in_channels, out_channels, size, stride, groups), nn.ReLU6(inplace=True)]
