"""Compression of messages between nodes: the difference from the last mean, in half precision.

All nodes have the last mean, bit for bit. A node sends the difference of its sum from it, and receives the difference
of the new mean. Differences are small, and half precision rounds them with the same relative error as large numbers.
Values that no learner has changed stay exact. The first mean has no reference and is sent uncompressed.
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
    """The format of compressed sums and means in messages.

    Attributes
    ----------
    dtype : ``torch.bfloat16`` or ``torch.float16``.
    error_feedback : add the rounding error of a message to the next one. This costs memory for one more slice.
    """

    dtype: torch.dtype
    error_feedback: bool = False


WIRE_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def wire_format(wire_dtype: str | None, error_feedback: bool) -> WireFormat | None:
    """Return the wire format for options; None for no compression.

    Parameters
    ----------
    wire_dtype : a name in `WIRE_DTYPES`; None for no compression.
    error_feedback : see `WireFormat`.

    Raises
    ------
    InputError
        If the name is unknown, or for `error_feedback` without compression.

    Examples
    --------
    >>> wire_format("bfloat16", error_feedback=True)
    WireFormat(dtype=torch.bfloat16, error_feedback=True)
    """
    if wire_dtype is None:
        if error_feedback:
            raise InputError("error_feedback", error_feedback, "left out without wire_dtype: nothing is rounded")
        return None
    if wire_dtype not in WIRE_DTYPES:
        raise InputError("wire_dtype", wire_dtype, f"one of {', '.join(WIRE_DTYPES)}, or left out")
    return WireFormat(WIRE_DTYPES[wire_dtype], error_feedback)


class Exact:
    """The code without compression. Codes convert sums and means to and from messages, in chunks ``[first:end]``.

    Parameters
    ----------
    dtype : dtype of the sums.
    """

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype = dtype

    def buffers(self, sums: Values) -> Tensor:
        """Return memory for the messages with `sums`, shape (nodes, numel)."""
        return torch.from_numpy(sums)

    def relate(self, first: int, end: int, total: Values, num_learners: int) -> None:
        """Convert `total`, the sum over `num_learners` of this node, to the difference that is sent, in place."""

    def encode(self, first: int, end: int, total: Values, coded: Tensor) -> None:
        """Write `total` to the message `coded`."""

    def decode(self, coded: Tensor, total: Values) -> None:
        """Write the message `coded` to `total`."""

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Write the mean in the message `coded` to `mean`, the same bits on all nodes."""


class First(Exact):
    """The code of the first mean: without compression. It keeps the mean as the reference of the next one.

    Parameters
    ----------
    start : start of the part of the array in this rank's lane.
    end : end of this part.
    dtype : dtype of the sums.
    wire_format : format of the next means.

    Attributes
    ----------
    next : the code of the next mean.
    """

    def __init__(self, start: int, end: int, dtype: np.dtype[Any], wire_format: WireFormat) -> None:
        super().__init__(dtype)
        self.next = Relative(start, end, dtype, wire_format)

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Keep `mean`."""
        self.next.reference[first - self.next.start : end - self.next.start] = mean


class Relative(Exact):
    """The code of later means: rounded differences from the last mean.

    Parameters
    ----------
    start : start of the part of the array in this rank's lane.
    end : end of this part.
    dtype : dtype of the sums.
    wire_format : format of the differences.

    Attributes
    ----------
    reference : the last mean of this part.
    residual : rounding errors of this part, if `wire_format` has error feedback.
    """

    def __init__(self, start: int, end: int, dtype: np.dtype[Any], wire_format: WireFormat) -> None:
        super().__init__(dtype)
        self.start = start
        self._wire_dtype = wire_format.dtype
        self.reference: Values = np.empty(end - start, dtype=dtype)
        self.residual = np.zeros_like(self.reference) if wire_format.error_feedback else None

    @property
    def next(self) -> Relative:
        """The code of the next mean."""
        return self

    def buffers(self, sums: Values) -> Tensor:
        """Return memory for the messages with `sums`, shape (nodes, numel)."""
        return torch.empty(sums.shape, dtype=self._wire_dtype)

    def relate(self, first: int, end: int, total: Values, num_learners: int) -> None:
        """Compute total = sum over the node's learners of (x_j - reference)."""
        np.subtract(total, total.dtype.type(num_learners) * self.reference[self._part(first, end)], out=total)

    def encode(self, first: int, end: int, total: Values, coded: Tensor) -> None:
        """Compute coded = round(total + residual) and residual = total + residual - coded."""
        if self.residual is None:
            put(total, coded)
            return
        residual = self.residual[self._part(first, end)]
        np.add(total, residual, out=residual)
        put(residual, coded)
        np.subtract(residual, coded.to(torch.from_numpy(residual).dtype).numpy(), out=residual)

    def decode(self, coded: Tensor, total: Values) -> None:
        """Write the message `coded` to `total`."""
        torch.from_numpy(total).copy_(coded)

    def settle(self, first: int, end: int, coded: Tensor, mean: Values) -> None:
        """Compute mean = reference = reference + coded."""
        reference = self.reference[self._part(first, end)]
        torch.from_numpy(reference).add_(coded)
        mean[...] = reference

    def _part(self, first: int, end: int) -> slice:
        return slice(first - self.start, end - self.start)
