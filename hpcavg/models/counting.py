"""How many parameters a network has, and how many multiply-adds an input takes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def num_parameters(model: nn.Module) -> int:
    """Return the number of elements of all parameters. BatchNorm's running statistics are not parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def multiply_adds(model: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the multiply-adds of convolutions and linear layers in the forward pass of one input, without biases.

    Parameters
    ----------
    model : torch.nn.Module
        On torch's meta device, where nothing is computed.
    input_shape : tuple of int
        The shape of one input.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import models
    >>> from hpcavg.models.counting import multiply_adds
    >>> with torch.device("meta"):
    ...     model = models.build("mlp", (1, 8, 8), 10)
    >>> multiply_adds(model, (1, 8, 8))
    25856
    """
    total = 0

    def add(module: nn.Conv1d | nn.Conv2d | nn.Linear, _: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        # Each element of the output is a sum over one row of the weight.
        total += output[0].numel() * math.prod(module.weight.shape[1:])

    counted = (nn.Conv1d, nn.Conv2d, nn.Linear)
    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, counted)]
    model(torch.empty(2, *input_shape, device="meta"))
    for hook in hooks:
        hook.remove()
    return total
