"""MNIST-1D (Greydanus and Kobak 2024, arXiv:2011.14439): signals of 40 values in ten classes.

The package ``mnist1d`` makes them from a seed. This takes half a minute: a folder for caches keeps them.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import random
import secrets
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError
from hpcavg.utils import files

NUM_TRAIN, NUM_TEST = 40_000, 10_000
LENGTH = 40
PACKAGE = "mnist1d"
_SEED = 42  # the package's own


def load() -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return 40,000 training samples, and 10,000 test samples after them.

    They are made if no cache has them. The cache is ``$XDG_CACHE_HOME/hpcavg``, or ``~/.cache/hpcavg``.

    Returns
    -------
    tuple
        Signals, float32 of shape (n, 1, 40), and their classes 0..9, int64.

    Raises
    ------
    InputError
        The package ``mnist1d`` is not installed.
    """
    try:
        version = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        allowed = f"used with the Python package {PACKAGE}, which is not installed: pip install hpcavg[paper]"
        raise InputError("task", "mnist1d", allowed) from error
    num_samples, folder = NUM_TRAIN + NUM_TEST, _cache()
    path = None if folder is None else folder / f"{PACKAGE}-{version}-{num_samples}.npz"
    samples = None if path is None else _read(path, num_samples)
    if samples is None:
        samples = _make(num_samples)
        if path is not None:
            _write(path, *samples)
    return samples


def _make(num_samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    from mnist1d.data import get_dataset_args, make_dataset  # imports matplotlib and requests

    arguments = get_dataset_args()
    arguments.num_samples, arguments.train_split, arguments.seed = num_samples, 1, _SEED
    before = random.getstate(), np.random.get_state()  # noqa: NPY002  which the package seeds and draws from
    try:
        made = make_dataset(arguments)
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
    return made["x"].astype(np.float32)[:, None], made["y"].astype(np.int64)


def _cache() -> Path | None:
    """Return the user's folder for caches of ours; None if there is no such folder for this user."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    with suppress(RuntimeError):  # no home folder
        return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "hpcavg"
    return None


def _read(path: Path, num_samples: int) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
    """Return the samples in a file that `_write` has written; None if it is missing or damaged."""
    with (
        suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile),
        files.open_file(path) as file,
        np.load(file, allow_pickle=False) as arrays,
    ):
        signals, classes = arrays["signals"], arrays["classes"]
        forms = [(array.shape, array.dtype) for array in (signals, classes)]
        if forms == [((num_samples, 1, LENGTH), np.float32), ((num_samples,), np.int64)]:
            return signals, classes
    return None


def _write(path: Path, signals: NDArray[np.float32], classes: NDArray[np.int64]) -> None:
    """Write the samples to a file, whole or not at all. A file that cannot be written is none: they are made again."""
    buffer = io.BytesIO()
    np.savez(buffer, signals=signals, classes=classes)
    # Several processes may make them at once; each writes a file of its own, and all have the same contents.
    own = path.with_name(f"{path.name}-{secrets.token_hex(8)}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.replace_file(own, [buffer.getbuffer()])
        try:
            os.replace(own, path)
        except OSError:
            own.unlink()
