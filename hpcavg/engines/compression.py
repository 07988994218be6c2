"""What crosses nodes, in fewer bytes: half precision of what has changed since the last mean.

All nodes know the last mean, bit for bit. A node sends how far its sum is from it, and gets how far the new mean is:
small numbers, of which half precision keeps as many digits as of large ones. What no learner has changed is exact, and
so is the first mean, which goes as it is for want of one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcavg.engines.reduction import Values, put
from hpcavg.errors import InputError


@dataclass(frozen=True)
class WireFormat:
    """How sums and means are written for the wire.

    dtype : ``torch.bfloat16`` or ``torch.float16``. error_feedback : what rounding takes away is added the next time,
    for one more slice of memory.
    """

    dtype: torch.dtype
    error_feedback: bool = False


WIRE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def wire_format(wire_dtype: str | None, error_feedback: bool) -> WireFormat | None:
    """Return the format of the given names, None where all goes as it is; raises `InputError` for others."""
    if wire_dtype is None:
        if error_feedback:
            raise InputError("error_feedback", error_feedback, "left out without wire_dtype: nothing is rounded")
        return None
    if wire_dtype not in WIRE_DTYPES:
        raise InputError("wire_dtype", wire_dtype, f"one of {', '.join(WIRE_DTYPES)}, or left out")
    return WireFormat(WIRE_DTYPES[wire_dtype], error_feedback)


class Exact:
    """Sums and means go as they are.

    dtype : of the sums.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def buffers(self, sums: Values) -> Tensor:
        """Return memory for what travels, of the form of `sums`: shape (nodes, numel)."""
        return torch.from_numpy(sums)

    def relate(self, first: int, end: int, total: Values, num_learners: int) -> None:
        """Make the sum over the `num_learners` of this node what is sent of it, but for rounding."""

    def encode(self, first: int, end: int, total: Values, coded: Tensor) -> None:
        """Write `total` to `coded` for the wire."""

    def decode(self, coded: Tensor, total: Values) -> None:
        """Write what arrived to `total`, to be added up."""

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Write the mean that `coded` stands for to `mean`, the same bits on all nodes."""


class First(Exact):
    """As `Exact`, and the mean is kept, to be the reference of the means to come."""

    def __init__(self, start: int, end: int, dtype: np.dtype[Any], wire_format: WireFormat) -> None:
        super().__init__(dtype)
        self.next = Relative(start, end, dtype, wire_format)

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Keep `mean`."""
        self.next.reference[first - self.next.start : end - self.next.start] = mean


class Relative(Exact):
    """Differences from the last mean, rounded.

    start, end : the part of the array that this rank's lane takes; `reference`, the last mean, and `residual`, what
    rounding took away, are of that part.
    """

    def __init__(self, start: int, end: int, dtype: np.dtype[Any], wire_format: WireFormat) -> None:
        super().__init__(dtype)
        self.start = start
        self._wire_dtype = wire_format.dtype
        self.reference: Values = np.empty(end - start, dtype=dtype)
        self.residual = np.zeros_like(self.reference) if wire_format.error_feedback else None

    @property
    def next(self) -> Relative:
        """What takes the next mean."""
        return self

    def buffers(self, sums: Values) -> Tensor:
        """Return memory for what arrives and leaves, of the form of `sums`: shape (nodes, numel)."""
        return torch.empty(sums.shape, dtype=self._wire_dtype)

    def relate(self, first: int, end: int, total: Values, num_learners: int) -> None:
        """Total = sum over the node's learners of (x_j - reference)."""
        np.subtract(total, total.dtype.type(num_learners) * self.reference[self._part(first, end)], out=total)

    def encode(self, first: int, end: int, total: Values, coded: Tensor) -> None:
        """Coded = round(total + residual); residual = total + residual - coded."""
        if self.residual is None:
            put(total, coded)
            return
        residual = self.residual[self._part(first, end)]
        np.add(total, residual, out=residual)
        put(residual, coded)
        np.subtract(residual, coded.to(torch.from_numpy(residual).dtype).numpy(), out=residual)

    def decode(self, coded: Tensor, total: Values) -> None:
        """Write what arrived to `total`, to be added up."""
        torch.from_numpy(total).copy_(coded)

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Mean = reference = reference + coded."""
        reference = self.reference[self._part(first, end)]
        torch.from_numpy(reference).add_(coded)
        mean[...] = reference

    def _part(self, first: int, end: int) -> slice:
        return slice(first - self.start, end - self.start)
