"""Residual networks: He et al. 2016 (ResNet) and Xie et al. 2017 (ResNeXt).

Every stage but the first halves height and width in its first block and doubles the channels. In a block with a
bottleneck the 3x3 convolution halves, as in today's ResNet-50 and ResNeXt; in He et al. the 1x1 convolution before it
does. For ResNet-50 this takes 6% more multiply-adds.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn.functional import pad, relu

from hpcavg.models.layers import classifier, conv_norm, conv_norm_relu, initialised


class Residual(nn.Module):
    """The rectified sum of a branch and a shortcut."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.branch, self.shortcut = branch, shortcut

    def forward(self, x: Tensor) -> Tensor:
        """Return relu(branch(x) + shortcut(x))."""
        return relu(self.branch(x) + self.shortcut(x))


class PaddedShortcut(nn.Module):
    """A shortcut without parameters (option A): every `stride`-th row and column, and zeros for the new channels."""

    def __init__(self, num_new_channels: int, stride: int) -> None:
        super().__init__()
        self.num_new_channels, self.stride = num_new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """Return shape (batch, channels + new channels, height / stride, width / stride)."""
        return pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.num_new_channels))


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or a 1x1 convolution if the shape changes (option B)."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return nn.Sequential(*conv_norm(in_channels, out_channels, 1, stride))


def _padding(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the identity, or zeros for new channels if the shape changes (option A)."""
    if in_channels == out_channels and stride == 1:
        return nn.Identity()
    return PaddedShortcut(out_channels - in_channels, stride)


def _basic_block(
    in_channels: int, out_channels: int, stride: int, shortcut: Callable[[int, int, int], nn.Module] = _projection
) -> Residual:
    branch = nn.Sequential(
        *conv_norm_relu(in_channels, out_channels, 3, stride), *conv_norm(out_channels, out_channels, 3)
    )
    return Residual(branch, shortcut(in_channels, out_channels, stride))


def _bottleneck(in_channels: int, out_channels: int, stride: int, cardinality: int = 1) -> Residual:
    """Return a block of `cardinality` paths, each a quarter as wide as the output. ResNet has one path."""
    width = cardinality * out_channels // 4
    branch = nn.Sequential(
        *conv_norm_relu(in_channels, width, 1),
        *conv_norm_relu(width, width, 3, stride, groups=cardinality),
        *conv_norm(width, out_channels, 1),
    )
    return Residual(branch, _projection(in_channels, out_channels, stride))


def _small_stem(in_channels: int, channels: int) -> nn.Sequential:
    """Return the first layers for images of 32x32: one 3x3 convolution, no pooling."""
    return nn.Sequential(*conv_norm_relu(in_channels, channels, 3))


def _imagenet_stem(in_channels: int) -> nn.Sequential:
    """Return the first layers for ImageNet: a 7x7 convolution to 64 channels and pooling, each of stride 2."""
    return nn.Sequential(*conv_norm_relu(in_channels, 64, 7, 2), nn.MaxPool2d(3, stride=2, padding=1))


def _network(
    stem: nn.Sequential,
    block: Callable[[int, int, int], nn.Module],
    stem_channels: int,
    stage_channels: int,
    depths: tuple[int, ...],
    num_classes: int,
) -> nn.Module:
    """Return a network: `stem`, a stage of each of the `depths` in blocks, and a classifier.

    The first stage has `stage_channels` channels; every other one has twice as many as the one before.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict(stem=stem)
    in_channels, out_channels = stem_channels, stage_channels
    for stage, depth in enumerate(depths, start=1):
        blocks = [block(in_channels, out_channels, 1 if stage == 1 else 2)]
        blocks += [block(out_channels, out_channels, 1) for _ in range(depth - 1)]
        layers[f"stage{stage}"] = nn.Sequential(*blocks)
        in_channels, out_channels = out_channels, 2 * out_channels
    layers["classifier"] = classifier(in_channels, num_classes)
    return initialised(nn.Sequential(layers))


def resnet18(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-18 for small images: a 3x3 convolution, no pooling, then the stages of He et al., table 1."""
    return _network(_small_stem(input_shape[0], 64), _basic_block, 64, 64, (2, 2, 2, 2), num_classes)


def resnet50(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-50 for small images: a 3x3 convolution, no pooling, then the stages of He et al., table 1."""
    return _network(_small_stem(input_shape[0], 64), _bottleneck, 64, 256, (3, 4, 6, 3), num_classes)


def resnet101(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-101 for small images: a 3x3 convolution, no pooling, then the stages of He et al., table 1."""
    return _network(_small_stem(input_shape[0], 64), _bottleneck, 64, 256, (3, 4, 23, 3), num_classes)


def resnet20(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-20 for CIFAR-10 (He et al., section 4.2): 16, 32, 64 channels, shortcuts of option A."""
    block = partial(_basic_block, shortcut=_padding)
    return _network(_small_stem(input_shape[0], 16), block, 16, 16, (3, 3, 3), num_classes)


def resnext29(input_shape: tuple[int, ...], num_classes: int, cardinality: int = 2) -> nn.Module:
    """Return ResNeXt-29, `cardinality` x 64d, for CIFAR. Xie et al. use cardinalities of 8 and 16."""
    block = partial(_bottleneck, cardinality=cardinality)
    return _network(_small_stem(input_shape[0], 64), block, 64, 256, (3, 3, 3), num_classes)


def resnet18_imagenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-18 for images of about 224x224 (He et al., table 1)."""
    return _network(_imagenet_stem(input_shape[0]), _basic_block, 64, 64, (2, 2, 2, 2), num_classes)


def resnet50_imagenet(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return ResNet-50 for images of about 224x224 (He et al., table 1)."""
    return _network(_imagenet_stem(input_shape[0]), _bottleneck, 64, 256, (3, 4, 6, 3), num_classes)
