"""Small networks for signals, whose inputs have shape (channels, length)."""

from __future__ import annotations

from torch import nn

from hpcavg.models.residual import Residual


def cnn1d(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the convolutional network of MNIST-1D (Greydanus and Kobak 2024): three convolutions, one linear layer."""
    channels, length = input_shape
    layers: list[nn.Module] = []
    for size in (5, 3, 3):
        layers += [nn.Conv1d(channels, 25, size, stride=2, padding=1), nn.ReLU()]
        channels, length = 25, (length + 2 - size) // 2 + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * length, num_classes))


def resnet1d(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small residual network with BatchNorm: a convolution, and blocks of 8, 16 and 32 channels.

    Each of these four halves the length. Shortcuts are 1x1 convolutions.
    """
    stem = nn.Sequential(*_conv_norm(input_shape[0], 8, 5, stride=2), nn.ReLU())
    blocks = [_block(before, after) for before, after in ((8, 8), (8, 16), (16, 32))]
    return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(32, num_classes))


def _block(in_channels: int, out_channels: int) -> Residual:
    branch = nn.Sequential(
        *_conv_norm(in_channels, out_channels, 3, stride=2), nn.ReLU(), *_conv_norm(out_channels, out_channels, 3)
    )
    return Residual(branch, nn.Sequential(*_conv_norm(in_channels, out_channels, 1, stride=2)))


def _conv_norm(in_channels: int, out_channels: int, size: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution and BatchNorm."""
    conv = nn.Conv1d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return [conv, nn.BatchNorm1d(out_channels)]
