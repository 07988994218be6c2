"""Training and test samples: arrays, or what stays in files."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError


class Samples(ABC):
    """Inputs that stay in files, which every rank reads by itself; small to pickle."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def __getitem__(self, index: NDArray[np.int64]) -> Any:
        """Return the samples with these numbers: an array whose first axis counts them, or what the transform takes."""


class Data(NamedTuple):
    """Training and test samples: arrays whose first axis counts samples, held once per node; inputs may be in files."""

    train_inputs: NDArray[Any] | Samples
    train_targets: NDArray[Any]
    test_inputs: NDArray[Any] | Samples
    test_targets: NDArray[Any]

    def check(self, name: str) -> None:
        """Raise `InputError` unless inputs and targets are arrays of the same, non-zero number of samples."""
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
