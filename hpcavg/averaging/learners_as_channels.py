"""Images of many learners as images of many channels, for `hpcavg.averaging.stacked`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class LearnersAsChannels(TorchFunctionMode):
    """In the block, ``torch.vmap`` runs convolutions, BatchNorm and pooling for images of R * C channels.

    R is the number of learners. The channels are innermost in memory, where torch's kernels for CPUs are several times
    as fast, and stay so from one layer to the next, without copies. ``torch.vmap`` alone copies the images before each
    pooling, keeps other orders, and takes two more passes for BatchNorm. Other devices are left to it.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` in its way, or in the one of this module."""
        if func in _FUNCTIONS and args and args[0].ndim == 4 and args[0].device.type == "cpu":
            func = _FUNCTIONS[func]
        return func(*args, **(kwargs or {}))


class _Merged(torch.autograd.Function):
    """Runs a function of the number of learners, images, and tensors whose first axis is that of the channels.

    The operations of its `vmap` are those of which torch takes the gradients.
    """

    @staticmethod
    def forward(function: Callable[..., Tensor], *tensors: Tensor | None) -> Tensor:
        return function(1, *tensors)  # which are the same for all learners

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, function: Callable[..., Tensor], images: Tensor, *others: Tensor | None
    ) -> tuple[Tensor, int]:
        learners = info.batch_size

        def of_learners(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor.expand(learners, *tensor.shape) if axis is None else tensor.movedim(axis, 0)

        # From (R, B, C, H, W) to (B, R * C, H, W): at most one copy, none of what this function has returned.
        merged = of_learners(images, in_dims[1]).permute(1, 3, 4, 0, 2).flatten(3).contiguous().permute(0, 3, 1, 2)
        rest = (
            None if other is None else of_learners(other, axis).flatten(0, 1)
            for other, axis in zip(others, in_dims[2:], strict=True)
        )
        output = function(learners, merged, *rest)
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return output.unflatten(1, (learners, -1)), 1


def _conv2d(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Any:
    def conv2d(learners: int, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.conv2d(images, weight, bias, stride, padding, dilation, learners * groups)

    return _Merged.apply(conv2d, images, weight, bias)


def _batch_norm(
    images: Tensor,
    mean: Tensor | None,
    variance: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *options: Any,
    **named: Any,
) -> Any:
    def batch_norm(_learners: int, *tensors: Any) -> Tensor:
        return functional.batch_norm(*tensors, *options, **named)

    return _Merged.apply(batch_norm, images, mean, variance, weight, bias)


def _pool(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def pool(images: Tensor, *sizes: Any, **named: Any) -> Any:
        return _Merged.apply(lambda _learners, merged: function(merged, *sizes, **named), images)

    return pool


_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    functional.conv2d: _conv2d,
    functional.batch_norm: _batch_norm,
    functional.max_pool2d: _pool(functional.max_pool2d),
    functional.avg_pool2d: _pool(functional.avg_pool2d),
    functional.adaptive_avg_pool2d: _pool(functional.adaptive_avg_pool2d),
}
