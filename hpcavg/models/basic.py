"""Small networks: logistic regression, a multi-layer perceptron, a small convolutional network."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import pad


def logistic(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return logistic regression for two classes, softmax regression for more. Parameters start at zero.

    The problem is convex. The optimizer's weight decay is its L2 term.
    """
    num_inputs = math.prod(input_shape)
    if num_classes == 2:
        return BinaryLogistic(num_inputs)
    return nn.Sequential(nn.Flatten(), _zero(nn.Linear(num_inputs, num_classes)))


class BinaryLogistic(nn.Module):
    """Logits (0, w.x + b) of two classes. Their cross entropy is the logistic loss of the weight vector w.

    A weight vector for each class would have another L2 term: half as strong on the difference of the two.
    """

    def __init__(self, num_inputs: int) -> None:
        super().__init__()
        self.linear = _zero(nn.Linear(num_inputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of shape (batch, 2)."""
        return pad(self.linear(x.flatten(1)), (1, 0))


def mlp(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a perceptron with two hidden layers of 128 rectified units."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(input_shape), 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, num_classes),
    )


def cnn(input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
    """Return a small convolutional network.

    Two 3x3 convolutions of 16 and 32 channels with BatchNorm, pooling to 4x4 pixels, and one linear layer.
    """
    return nn.Sequential(
        nn.Conv2d(input_shape[0], 16, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, num_classes),
    )


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
