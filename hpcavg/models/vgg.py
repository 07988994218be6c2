"""VGG, Simonyan and Zisserman 2015, for small images: with BatchNorm, and one linear layer in place of three."""

from __future__ import annotations

from torch import nn

from hpcavg.models.layers import classifier, initialised

# Channels of each stage. Pooling ends a stage.
_CHANNELS = (64, 128, 256, 512, 512)


def vgg16(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return VGG-16, configuration D: 13 convolutions."""
    return _network(input_shape[0], num_classes, (2, 2, 3, 3, 3))


def vgg19(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return VGG-19, configuration E: 16 convolutions."""
    return _network(input_shape[0], num_classes, (2, 2, 4, 4, 4))


def _network(in_channels: int, num_classes: int, depths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, depth in zip(_CHANNELS, depths, strict=True):
        for _ in range(depth):
            # The bias is the paper's; BatchNorm cancels it.
            convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    return initialised(nn.Sequential(*layers, classifier(in_channels, num_classes)))
