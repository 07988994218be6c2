"""Lines of libsvm text: ``label index:value index:value ... # comment``; indices rise from 1, absent values are 0."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SEPARATED = bytes.maketrans(b":", b" ")
_OF_NUMBERS = b"0123456789+-.eE"


def read_line(line: bytes, row: NDArray[np.float32], indices: list[bytes]) -> float | None:
    """Read a line.

    Parameters
    ----------
    line : bytes
        The line.
    row : array of float32
        Shape (features,). The values are written to it.
    indices : list of bytes
        The texts of 1, 2, ..., features. A line that has them all, as in dense data, is read faster.

    Returns
    -------
    float or None
        The label; None if the line is empty.

    Raises
    ------
    ValueError
        The line is not in this format. The message says why.
    """
    line = line.partition(b"#")[0].strip()
    if not line:
        return None
    tokens = line.translate(_SEPARATED).split()
    num_values = len(tokens) // 2
    # What remains without numbers: a space and a colon for every value.
    form = b" :" * num_values
    if line.translate(None, _OF_NUMBERS) != form:
        line = b" ".join(line.split())  # it may have more or other blanks
    if line.translate(None, _OF_NUMBERS) != form or len(tokens) != 2 * num_values + 1:
        raise ValueError("it is not: label index:value index:value ...")
    label = float(_numbers(tokens[:1], float)[0])
    values = _numbers(tokens[2::2], float)
    with np.errstate(over="ignore"):
        if tokens[1::2] == indices:
            row[:] = values
        else:
            where = _numbers(tokens[1::2], int)
            _check_indices(where, len(row))
            row[:] = 0
            row[where.astype(np.int64) - 1] = values
    if not np.isfinite(row).all():
        raise ValueError("it has a value beyond those of float32")
    return label


def _numbers(tokens: list[bytes], kind: type) -> NDArray[Any]:
    """Return floats, or integers of any size."""
    try:
        return np.fromiter(map(kind, tokens), np.float64 if kind is float else object, len(tokens))
    except ValueError as error:
        raise ValueError(f"it has what is no number: {str(error).rpartition(': ')[2]}") from error


def _check_indices(indices: NDArray[Any], num_features: int) -> None:
    last = 0
    for index in indices:
        if index > num_features:
            raise ValueError(f"it has feature {index} of {num_features}")
        if index <= last:
            raise ValueError(f"its indices do not rise from 1: {index} comes after {last}")
        last = index
