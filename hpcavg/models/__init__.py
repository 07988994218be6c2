"""Reference networks, by name. torch and a network's own module are imported when the network is built."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from hpcavg.errors import InputError

if TYPE_CHECKING:
    from torch import nn

_DIGITS, _CIFAR, _IMAGENET, _SIGNAL = (1, 8, 8), (3, 32, 32), (3, 224, 224), (1, 40)


@dataclass(frozen=True)
class Network:
    """What is known of a network before it is built.

    Attributes
    ----------
    family : the module of this package that builds it, by a function of the network's name with underscores.
    text : what the network is, and its paper.
    input_shape : the shape of one usual input: (channels, height, width), or (channels, length) of a signal.
    num_classes : the usual number of classes.
    num_parameters : the number of parameters, for these inputs and classes.
    multiply_adds : the multiply-adds of one such input in the forward pass; see `hpcavg.models.counting`.
    min_pixels : height and width of the smallest images, or length of the shortest signals, that it takes; None if it
        takes inputs of any shape.
    """

    family: str
    text: str
    input_shape: tuple[int, ...]
    num_classes: int
    num_parameters: int
    multiply_adds: int
    min_pixels: int | None

    def check(self, name: str, input_shape: tuple[int, ...]) -> None:
        """Check that the network takes inputs of a shape.

        Parameters
        ----------
        name : str
            The network's name, for the error.
        input_shape : tuple of int
            The shape of one input.

        Raises
        ------
        InputError
            The network takes images or signals, or larger ones.
        """
        if self.min_pixels is None:
            return
        shape, kind = "x".join(map(str, input_shape)), "images" if len(self.input_shape) == 3 else "signals"
        if len(input_shape) != len(self.input_shape):
            raise InputError("model", name, f"a network for inputs of shape {shape}; {name} takes {kind}")
        if min(input_shape[1:]) < self.min_pixels:
            smallest = "x".join([str(self.min_pixels)] * (len(input_shape) - 1))
            raise InputError(
                "model", name, f"a network for {kind} of {shape}; {name} takes those of {smallest} and more"
            )


# Networks that halve their images need images of which at least 2x2 pixels remain; a signal, two values. BatchNorm then
# has several values per channel even in a batch of one.
NETWORKS = {
    "logistic": Network("basic", "logistic or softmax regression, from zero", _DIGITS, 10, 650, 640, None),
    "mlp": Network("basic", "two hidden layers of 128", _DIGITS, 10, 26_122, 25_856, None),
    "cnn": Network("basic", "two 3x3 convolutions, one linear layer", _DIGITS, 10, 9_978, 309_248, 1),
    "cnn1d": Network("signals", "CNN of MNIST-1D; Greydanus, Kobak 2024", _SIGNAL, 10, 5_210, 31_750, 3),
    "resnet1d": Network("signals", "three residual blocks with BatchNorm", _SIGNAL, 10, 7_570, 27_360, 17),
    "nin": Network("nin", "Network in Network; Lin et al. 2013", _CIFAR, 10, 968_394, 222_486_528, 8),
    "vgg16": Network("vgg", "VGG-16 with BatchNorm; Simonyan, Zisserman 2015", _CIFAR, 10, 14_728_266, 313_201_664, 32),
    "vgg19": Network("vgg", "VGG-19 with BatchNorm; Simonyan, Zisserman 2015", _CIFAR, 10, 20_040_522, 398_136_320, 32),
    "googlenet": Network(
        "inception", "GoogLeNet with BatchNorm; Szegedy et al. 2015", _CIFAR, 10, 5_871_914, 1_447_241_728, 8
    ),
    "resnet18": Network("residual", "ResNet-18; He et al. 2016", _CIFAR, 10, 11_173_962, 555_422_720, 16),
    "resnet20": Network("residual", "ResNet-20; He et al. 2016", _CIFAR, 10, 269_722, 40_551_040, 8),
    "resnet50": Network("residual", "ResNet-50; He et al. 2016", _CIFAR, 10, 23_520_842, 1_297_829_888, 16),
    "resnet101": Network("residual", "ResNet-101; He et al. 2016", _CIFAR, 10, 42_512_970, 2_509_983_744, 16),
    "resnext29": Network("residual", "ResNeXt-29, 2x64d; Xie et al. 2017", _CIFAR, 10, 9_130_314, 1_411_065_856, 8),
    "densenet121": Network("dense", "DenseNet-121; Huang et al. 2017", _CIFAR, 10, 6_956_298, 888_350_720, 16),
    "dpn92": Network("dual_path", "DPN-92; Chen et al. 2017", _CIFAR, 10, 34_998_602, 2_085_382_400, 16),
    "mobilenet": Network("mobile", "MobileNet; Howard et al. 2017", _CIFAR, 10, 3_217_226, 46_354_432, 32),
    "mobilenetv2": Network("mobile", "MobileNetV2; Sandler et al. 2018", _CIFAR, 10, 2_236_682, 87_976_448, 16),
    "resnet18-imagenet": Network(
        "residual", "ResNet-18; He et al. 2016", _IMAGENET, 1000, 11_689_512, 1_814_073_344, 64
    ),
    "resnet50-imagenet": Network(
        "residual", "ResNet-50; He et al. 2016", _IMAGENET, 1000, 25_557_032, 4_089_184_256, 64
    ),
}


def build(name: str, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a network with new parameters: the same bits after the same ``torch.manual_seed``.

    Parameters
    ----------
    name : str
        A key of `NETWORKS`.
    input_shape : tuple of int
        The shape of one input, such as (channels, height, width).
    num_classes : int
        The number of outputs.

    Returns
    -------
    torch.nn.Module
        It takes a batch of inputs and returns logits of shape (batch, num_classes).

    Raises
    ------
    InputError
        There is no network of this name, or it does not take such inputs.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import models
    >>> model = models.build("resnet20", (3, 32, 32), num_classes=10)
    >>> model(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    if name not in NETWORKS:
        raise InputError("model", name, f"one of {', '.join(NETWORKS)}")
    network = NETWORKS[name]
    network.check(name, input_shape)
    family = import_module(f"{__name__}.{network.family}")
    return getattr(family, name.replace("-", "_"))(input_shape, num_classes)


def describe() -> str:
    """Return a table of the networks, a line each."""
    row = "{:18}{:11}{:>7}{:>12}{:>15}  {}".format
    lines = [row("network", "input", "classes", "parameters", "multiply-adds", "what it is")]
    for name, network in NETWORKS.items():
        shape = "x".join(map(str, network.input_shape))
        counts = (f"{count:,}" for count in (network.num_classes, network.num_parameters, network.multiply_adds))
        lines.append(row(name, shape, *counts, network.text))
    return "\n".join(lines)
