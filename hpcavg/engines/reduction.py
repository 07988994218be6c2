"""Sums of rows in memory, a piece at a time that fits a core's cache.

NumPy does what it has types for: its calls cost a third of torch's, and pieces make many of them. Half precision, which
it cannot sum well, is summed by torch in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# NumPy's, over whatever memory.
Values: TypeAlias = NDArray[Any]
# A tensor's memory as NumPy sees it, or the tensor where NumPy is of no use.
Array: TypeAlias = "Values | Tensor"

_HALF = (torch.float16, torch.bfloat16)

# 128 KiB of float32: the pieces of the mean and of a few rows fit a core's cache.
PIECE_ELEMENTS = 32 * 1024
# Slices start on multiples of this many elements: no cache line has two writers.
ALIGNMENT_ELEMENTS = 64


def as_array(tensor: Tensor) -> Array:
    """Return what `average` works on fastest, over the same memory."""
    return tensor if tensor.dtype in _HALF else tensor.numpy()


def sum_dtype(row: Array) -> np.dtype[Any]:
    """Return what rows like `row` are summed in."""
    return row.dtype if isinstance(row, np.ndarray) else np.dtype(np.float32)


def slice_of(numel: int, index: int, count: int) -> tuple[int, int]:
    """Return the first and the last element but one of slice `index` of `count`; slices start on cache lines."""
    units = -(-numel // ALIGNMENT_ELEMENTS)
    start, end = (units * i // count * ALIGNMENT_ELEMENTS for i in (index, index + 1))
    return min(start, numel), min(end, numel)


def average(rows: Sequence[Array], targets: Sequence[Array], start: int, end: int, count: int) -> None:
    """Write the sum of all `rows`, divided by `count`, to ``[start:end]`` of all `targets`, which may be the rows.

    The order of the sum is that of the rows, whoever takes it.
    """
    for first in range(start, end, PIECE_ELEMENTS):
        piece = slice(first, min(first + PIECE_ELEMENTS, end))
        total, others = targets[0][piece], targets[1:]
        if isinstance(total, Tensor):
            total, others = np.empty(piece.stop - first, dtype=np.float32), targets
        add_up([row[piece] for row in rows], total)
        divide(total, count)
        for target in others:
            put(total, target[piece])


def add_up(parts: Sequence[Array], total: Values) -> None:
    """Write the sum of `parts`, in their order, to `total`, which may be one of the first two of them."""
    if isinstance(parts[0], Tensor):
        result = torch.from_numpy(total).copy_(parts[0])
        for part in parts[1:]:
            result.add_(torch.as_tensor(part))
        return
    if len(parts) == 1:
        np.copyto(total, parts[0])
    else:
        np.add(parts[0], parts[1], out=total)
    for part in parts[2:]:
        np.add(total, part, out=total)


def put(values: Values, target: Array) -> None:
    """Copy `values` to `target`."""
    if isinstance(target, Tensor):
        target.copy_(torch.from_numpy(values))
    else:
        np.copyto(target, values)


def divide(total: Values, count: int) -> None:
    """Divide `total` by `count` in place: by a power of two as a product, which is exact then, and faster."""
    if count & (count - 1):
        np.divide(total, count, out=total)
    else:
        np.multiply(total, 1 / count, out=total)
