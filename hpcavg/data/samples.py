"""Training and test samples: in arrays or in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError


class Samples(ABC):
    """Inputs that stay in files. Every rank reads them by itself. A pickle of them is small.

    Derive a class from it for a format of your own, and put it in place of an array of inputs in `Data`.
    """

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def __getitem__(self, index: NDArray[np.int64]) -> Any:
        """Return the samples with these numbers: an array whose first axis counts them, or the transform's input."""


class Data(NamedTuple):
    """Training and test samples. Arrays are held once per node; their first axis counts the samples.

    Attributes
    ----------
    train_inputs : array or `Samples`, which stay in files.
    train_targets : array, one target for each input.
    test_inputs : array or `Samples`.
    test_targets : array.
    """

    train_inputs: NDArray[Any] | Samples
    train_targets: NDArray[Any]
    test_inputs: NDArray[Any] | Samples
    test_targets: NDArray[Any]

    def check(self, name: str) -> None:
        """Raise `InputError` unless there is a target for each input, and at least one; `name` is the task's."""
        for field, array in self._asdict().items():
            if isinstance(array, Samples) and field.endswith("inputs") and len(array) > 0:
                continue
            is_numbers = isinstance(array, np.ndarray) and array.dtype.kind in "biuf" and array.dtype.isnative
            if not is_numbers or array.ndim < 1 or len(array) < 1:
                raise InputError(
                    "task", name, f"data whose {field} is a NumPy array of numbers with at least one sample"
                )
        for part in ("train", "test"):
            inputs, targets = len(getattr(self, f"{part}_inputs")), len(getattr(self, f"{part}_targets"))
            if inputs != targets:
                raise InputError("task", name, f"one target per input; {part} has {inputs} inputs, {targets} targets")
