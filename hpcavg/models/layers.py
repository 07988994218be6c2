"""Parts of the networks: convolutions with normalisation, the classifier, and initial values."""

from __future__ import annotations

from torch import nn


def conv(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a convolution of an odd `size`, padded to keep height and width at stride 1, without bias."""
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, groups=groups, bias=False)


def conv_norm(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a `conv` and BatchNorm."""
    return [conv(in_channels, out_channels, size, stride, groups), nn.BatchNorm2d(out_channels)]


def conv_norm_relu(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return a `conv`, BatchNorm and ReLU."""
    return [*conv_norm(in_channels, out_channels, size, stride, groups), nn.ReLU(inplace=True)]


def norm_relu(channels: int) -> list[nn.Module]:
    """Return BatchNorm and ReLU."""
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


def norm_relu_conv(in_channels: int, out_channels: int, size: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Return BatchNorm, ReLU and a `conv`: the order for networks that do not rectify sums and concatenations."""
    return [*norm_relu(in_channels), conv(in_channels, out_channels, size, stride, groups)]


def classifier(channels: int, num_classes: int) -> nn.Sequential:
    """Return the mean over height and width, followed by one linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


def initialised(network: nn.Module) -> nn.Module:
    """Return `network` with convolutions of variance 2 / fan-in and no bias (He et al. 2015).

    Fan-in is right for grouped convolutions, too. Linear layers and BatchNorm keep torch's initial values.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return network
