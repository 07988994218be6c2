"""Arrays that stay in files. Every rank of a node maps them; the page cache holds them once."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.data.samples import Samples
from hpcavg.errors import InputError, reason


class MappedArray(Samples):
    """An array in a file, in C order. It is mapped when it is first read; a pickle holds only its position.

    The first read raises `InputError` if the file is truncated.

    Parameters
    ----------
    path : Path
        The file.
    offset : int
        The byte at which the array begins.
    shape : tuple of int
        The shape of the array; the first axis counts the samples.
    dtype : str
        The dtype of the array.
    """

    def __init__(self, path: Path, offset: int, shape: tuple[int, ...], dtype: str) -> None:
        self.path, self.offset, self.shape, self.dtype = path, offset, shape, np.dtype(dtype)
        self._array: NDArray[Any] | None = None

    def __reduce__(self) -> tuple[type[MappedArray], tuple[Path, int, tuple[int, ...], str]]:
        return MappedArray, (self.path, self.offset, self.shape, self.dtype.str)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: NDArray[np.int64]) -> NDArray[Any]:
        """Return the samples with these numbers as an array in memory."""
        if self._array is None:
            self._array = self._map()
        return self._array[index]

    def _map(self) -> NDArray[Any]:
        end = self.offset + math.prod(self.shape) * self.dtype.itemsize
        try:
            if self.path.stat().st_size < end:
                raise InputError("data_dir", str(self.path), f"a file of at least {end} bytes; it is cut off")
            return np.memmap(self.path, self.dtype, "r", self.offset, self.shape).view(np.ndarray)
        except OSError as error:
            raise InputError("data_dir", str(self.path), f"a file that can be read ({reason(error)})") from error
