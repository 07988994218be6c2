"""Layers of many learners as layers of many channels, for `hpcavg.averaging.stacked`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_Functions: TypeAlias = Mapping[Callable[..., Any], Callable[..., Any]]


class LearnersAsChannels(TorchFunctionMode):
    """In the block, ``torch.vmap`` runs some functions of C channels once for R * C channels, those of all R learners.

    Parameters
    ----------
    functions : `IMAGES` or `STATISTICS`.

        `IMAGES`: convolutions, normalisation and pooling of images on CPUs, and all BatchNorm. Channels of images are
        then innermost in memory, where torch's kernels are several times as fast, and stay so from one layer to the
        next, without copies. ``torch.vmap`` alone copies the images before each pooling, keeps other orders, and takes
        two more passes for BatchNorm.

        `STATISTICS`: BatchNorm alone. It changes the learners' own statistics, or raises an error; ``torch.vmap`` alone
        may change a copy of them.
    """

    def __init__(self, functions: _Functions) -> None:
        super().__init__()
        self._functions = functions

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func` in its way, or in the one of this module."""
        return self._functions.get(func, func)(*args, **(kwargs or {}))


class _Merged(torch.autograd.Function):
    """Runs a layer for the samples of all learners; the operations of `vmap` are those that torch differentiates.

    The layer is a function of the number of learners R, of samples of shape (B, R * C, ...), and of other tensors,
    which have an axis of learners in front.
    """

    @staticmethod
    def forward(layer: Callable[..., Tensor], is_innermost: bool, *tensors: Tensor | None) -> Tensor:
        """Refuse tensors that are the same for all learners: there is no `backward` for them."""
        raise RuntimeError("a layer of which no tensor belongs to a learner")

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing."""

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        layer: Callable[..., Tensor],
        is_innermost: bool,
        samples: Tensor,
        *others: Tensor | None,
    ) -> tuple[Tensor, int]:
        """Run the layer once."""

        def of_learners(tensor: Tensor, axis: int | None) -> Tensor:
            return tensor.expand(info.batch_size, *tensor.shape) if axis is None else tensor.movedim(axis, 0)

        samples = of_learners(samples, in_dims[2])
        rest = [
            tensor if tensor is None else of_learners(tensor, axis)
            for tensor, axis in zip(others, in_dims[3:], strict=True)
        ]
        if is_innermost:  # at most one copy, none of what this function has returned
            merged = samples.permute(1, 3, 4, 0, 2).flatten(3).contiguous().permute(0, 3, 1, 2)
        else:
            merged = samples.transpose(0, 1).flatten(1, 2)
        output = layer(info.batch_size, merged, *rest)
        if is_innermost and output.requires_grad:
            output.register_hook(lambda gradient: gradient.contiguous(memory_format=torch.channels_last))
        return output.unflatten(1, (info.batch_size, -1)), 1


def _is_innermost(samples: Tensor) -> bool:
    return samples.ndim == 4 and samples.device.type == "cpu"


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
        bias = bias if bias is None else bias.flatten()
        return functional.conv2d(images, weight.flatten(0, 1), bias, stride, padding, dilation, learners * groups)

    if not _is_innermost(images):
        return functional.conv2d(images, weight, bias, stride, padding, dilation, groups)
    return _Merged.apply(conv2d, True, images, weight, bias)


def _batch_norm(is_innermost: Callable[[Tensor], bool]) -> Callable[..., Any]:
    def of_samples(
        samples: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        *options: Any,
        **named: Any,
    ) -> Any:
        def batch_norm(_learners: int, samples: Tensor, *others: Tensor | None) -> Tensor:
            mean, variance = (tensor if tensor is None else tensor.view(-1) for tensor in others[:2])  # never a copy
            scale, shift = (tensor if tensor is None else tensor.flatten() for tensor in others[2:])
            return functional.batch_norm(samples, mean, variance, scale, shift, *options, **named)

        return _Merged.apply(batch_norm, is_innermost(samples), samples, running_mean, running_var, weight, bias)

    return of_samples


def _group_norm(
    images: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Any:
    def group_norm(learners: int, images: Tensor, *others: Tensor | None) -> Tensor:
        scale, shift = (tensor if tensor is None else tensor.flatten() for tensor in others)
        return functional.group_norm(images, learners * num_groups, scale, shift, eps)

    if not _is_innermost(images):
        return functional.group_norm(images, num_groups, weight, bias, eps)
    return _Merged.apply(group_norm, True, images, weight, bias)


def _pool(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def pool(images: Tensor, *sizes: Any, **named: Any) -> Any:
        if not _is_innermost(images):
            return function(images, *sizes, **named)
        return _Merged.apply(lambda _learners, merged: function(merged, *sizes, **named), True, images)

    return pool


STATISTICS: _Functions = {functional.batch_norm: _batch_norm(lambda samples: False)}
IMAGES: _Functions = {
    functional.conv2d: _conv2d,
    functional.batch_norm: _batch_norm(_is_innermost),
    functional.group_norm: _group_norm,
    functional.max_pool2d: _pool(functional.max_pool2d),
    functional.avg_pool2d: _pool(functional.avg_pool2d),
    functional.adaptive_avg_pool2d: _pool(functional.adaptive_avg_pool2d),
}
