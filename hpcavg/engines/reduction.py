"""Sums of rows in memory, in pieces that fit a core's cache.

Pieces need many calls, and a call of NumPy costs a third of a call of torch. NumPy therefore does the sums, except in
half precision, which torch sums in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = NDArray[Any]
"""A NumPy array."""

Array: TypeAlias = "Values | Tensor"
"""A NumPy array over a tensor's memory; in half precision and on devices, the tensor."""

_HALF = (torch.float16, torch.bfloat16)

PIECE_ELEMENTS = 64 * 1024
"""256 KiB of float32: the pieces of the mean and of a few rows fit a core's cache."""

ALIGNMENT_ELEMENTS = 64
"""Slices start on multiples of this number of elements: no two ranks write to one cache line."""


def as_array(tensor: Tensor) -> Array:
    """Return the memory of `tensor` as the array type that `average` works on fastest."""
    return tensor if tensor.dtype in _HALF or tensor.device.type != "cpu" else tensor.numpy()


def copy_of(array: Array) -> Array:
    """Return a copy of `array` in memory of its own."""
    return array.clone() if isinstance(array, Tensor) else array.copy()


def sum_dtype(row: Array) -> np.dtype[Any]:
    """Return the dtype in which rows like `row` are summed."""
    return row.dtype if isinstance(row, np.ndarray) else np.dtype(np.float32)


def slice_of(numel: int, index: int, count: int) -> tuple[int, int]:
    """Return start and end of one of `count` slices; slices start on cache lines.

    Examples
    --------
    >>> [slice_of(1000, index, 3) for index in range(3)]
    [(0, 320), (320, 640), (640, 1000)]
    """
    units = -(-numel // ALIGNMENT_ELEMENTS)
    start, end = (units * i // count * ALIGNMENT_ELEMENTS for i in (index, index + 1))
    return min(start, numel), min(end, numel)


def average(rows: Sequence[Array], targets: Sequence[Array], start: int, end: int, count: int) -> None:
    """Write the sum of all rows, divided by `count`, to all targets. The sum is in the order of the rows.

    Parameters
    ----------
    rows : arrays of shape (numel,).
    targets : arrays of shape (numel,); they may be the rows.
    start : first element to sum and write.
    end : end of these elements.
    count : the divisor.

    Examples
    --------
    >>> mean = np.zeros(3)
    >>> average([np.array([1.0, 2.0, 3.0]), np.array([3.0, 4.0, 5.0])], [mean], start=0, end=2, count=2)
    >>> mean.tolist()
    [2.0, 3.0, 0.0]
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
    """Write the sum of `parts`, in their order, to `total`, which may be one of the first two parts."""
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


def gather(rows: Sequence[Array], targets: Sequence[Array], first: int, end: int) -> Values:
    """Return the sum of the elements ``[first:end]`` of `rows`: in the first target, if MPI can sum its dtype.

    Parameters
    ----------
    rows : arrays of shape (numel,).
    targets : arrays of shape (numel,), of which the first may be the first row.
    first : first element.
    end : end of these elements.
    """
    target = targets[0]
    if not isinstance(target, np.ndarray):
        total = np.empty(end - first, dtype=sum_dtype(target))
        add_up([row[first:end] for row in rows], total)
        return total
    if len(rows) > 1 or target is not rows[0]:
        for at in range(first, end, PIECE_ELEMENTS):  # in the cache
            piece = slice(at, min(at + PIECE_ELEMENTS, end))
            add_up([row[piece] for row in rows], target[piece])
    return target[first:end]


def spread(total: Values, count: int, targets: Sequence[Array], first: int) -> None:
    """Divide `total`, which `gather` returned and others have added to, by `count`, and write it to all targets.

    Parameters
    ----------
    total : the sum.
    count : the divisor.
    targets : arrays of shape (numel,).
    first : first element of the sum in them.
    """
    others = targets[isinstance(targets[0], np.ndarray) :]
    if not others:
        divide(total, count)
        return
    for at in range(0, len(total), PIECE_ELEMENTS):
        piece = total[at : at + PIECE_ELEMENTS]
        divide(piece, count)
        for target in others:
            put(piece, target[first + at : first + at + len(piece)])


def put(values: Values, target: Array) -> None:
    """Copy `values` to `target`."""
    if isinstance(target, Tensor):
        target.copy_(torch.from_numpy(values))
    else:
        np.copyto(target, values)


def divide(total: Values, count: int) -> None:
    """Divide `total` by `count` in place. If `count` is a power of two, a product is exact and faster."""
    if count & (count - 1):
        np.divide(total, count, out=total)
    else:
        np.multiply(total, 1 / count, out=total)
