"""Sums and means over the learners of one rank, on any device. They are in the order of the rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hpcavg.engines.reduction import as_array, average


def as_real(values: Tensor) -> Tensor:
    """Return the memory of `values`, shape (..., numel), as a tensor of real numbers, shape (..., 2 numel) if complex.

    MPI and NumPy can sum real numbers only.
    """
    return torch.view_as_real(values).flatten(-2) if values.is_complex() else values


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which values are summed: float32 for half precision, else their own."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def divide(total: Tensor, count: int) -> None:
    """Divide `total` by `count` in place.

    The divisor is on the device: CUDA multiplies by the reciprocal of a number on the host, which rounds twice.

    Examples
    --------
    >>> total = torch.tensor([3.0, 5.0])
    >>> divide(total, 2)
    >>> total
    tensor([1.5000, 2.5000])
    """
    total.div_(torch.full((), count, dtype=total.dtype, device=total.device))


def is_in_place(rows: Tensor, out: Tensor) -> bool:
    """Return whether a mean of `rows` with this `out` replaces the rows; see `hpcavg.engines.base.Engine.mean`."""
    return out is rows or out.data_ptr() == rows.data_ptr()


def targets_of(rows: Tensor, out: Tensor) -> Tensor:
    """Return all rows to which a mean of `rows` with this `out` is written, shape (targets, numel)."""
    return rows if is_in_place(rows, out) else out.unsqueeze(0)


def sum_rows(rows: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """Return the sum of `rows`, in the dtype of sums.

    Parameters
    ----------
    rows : each of shape (numel,).
    out : memory for the sum, which may be the first row. None: new memory.

    Examples
    --------
    >>> sum_rows(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).unbind())
    tensor([ 9., 12.])
    """
    dtype = wide(rows[0].dtype)
    if len(rows) == 1:
        if out is None:
            return rows[0].to(dtype, copy=True)
        return out if out.data_ptr() == rows[0].data_ptr() else out.copy_(rows[0])
    total = torch.add(rows[0].to(dtype), rows[1], out=out)
    for row in rows[2:]:
        total.add_(row)
    return total


def mean_of_rows(rows: Tensor, out: Tensor, num_well: int | None = None) -> None:
    """Write the mean of `rows` to `out`. Each row is read once.

    Parameters
    ----------
    rows : shape (learners, numel).
    out : the mean, shape (numel,); or `rows` itself, of which every row becomes the mean.
    num_well : number of rows that the mean includes; the others must be zero. None: all rows.

    Examples
    --------
    >>> rows, out = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.empty(2)
    >>> mean_of_rows(rows, out)
    >>> out
    tensor([2., 3.])
    >>> mean_of_rows(rows, rows)
    >>> rows
    tensor([[2., 3.],
            [2., 3.]])
    """
    num_rows = rows.shape[0]
    if num_rows == 1:
        if not is_in_place(rows, out):
            out.copy_(rows[0])
        return
    rows, count = as_real(rows), num_well or num_rows
    targets = targets_of(rows, as_real(out))
    if rows.device.type == "cpu":
        average(list(map(as_array, rows)), list(map(as_array, targets)), 0, rows.shape[1], count)
    else:
        total = sum_rows(rows.unbind())
        divide(total, count)
        targets.copy_(total)
