"""VGG, Simonyan and Zisserman 2015, for small images: with BatchNorm, and one linear layer in place of three."""

from __future__ import annotations

from torch import nn

from hpcavg.models.layers import classifier, initialised

# channels of each stage, which a pooling ends
_CHANNELS = (64, 128, 256, 512, 512)


def vgg16(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the convolutions of configuration D: 13."""
    return _network(input_shape[0], num_classes, (2, 2, 3, 3, 3))


def vgg19(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return the convolutions of configuration E: 16."""
    return _network(input_shape[0], num_classes, (2, 2, 4, 4, 4))


def _network(in_channels: int, num_classes: int, depths: tuple[int, ...]) -> nn.Module:
    layers: list[nn.Module] = []
    for channels, depth in zip(_CHANNELS, depths, strict=True):
        for _ in range(depth):
            # with a bias, as in the paper, though the normalisation takes it away again
            convolution = nn.Conv2d(in_channels, channels, 3, padding=1)
            layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
            in_channels = channels
        layers.append(nn.MaxPool2d(2))
    return initialised(nn.Sequential(*layers, classifier(in_channels, num_classes)))
