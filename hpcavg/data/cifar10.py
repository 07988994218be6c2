"""CIFAR-10 (Krizhevsky, 2009): colour images of 32 x 32 pixels in ten classes, in its binary or python version."""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.errors import InputError, reason
from hpcavg.utils import files

NUM_CLASSES = 10
SHAPE = (3, 32, 32)
FOLDERS = {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"
IMAGES_PER_FILE = 10_000
WHERE = "https://www.cs.toronto.edu/~kriz/cifar.html"

_PIXELS = 3072
_RECORD = 1 + _PIXELS
_MAX_BYTES = 2**26  # in a file; the original files have 31 MB

# A pickled batch: the keys of the dict, as texts of Python 2 or 3, and the instructions that hold numbers and texts.
_KEYS = ("batch_label", "labels", "data", "filenames")
_KEY_OF = {form: key for key in _KEYS for form in (key, key.encode())}
_LITERALS = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES"),
    *("BINBYTES8", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_CONSTANTS = {"NEWTRUE": True, "NEWFALSE": False}
_NUMPY_NAMES = {
    *("numpy.core.multiarray", "numpy._core.multiarray", "_reconstruct", "numpy", "ndarray", "dtype"),
    "latin1",  # the encoding of bytes that Python 3 wrote as text
}
_MAX_INSTRUCTIONS = 2**18  # one byte in the file may become a hundred in memory

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def load(folder: Path) -> tuple[Images, Labels, Images, Labels]:
    """Read the training and the test images.

    Parameters
    ----------
    folder : Path
        The folder with the six files of either version, or its parent. The files may have any number of images.

    Returns
    -------
    train_images : array of uint8
        Shape (n, 3, 32, 32).
    train_labels : array of int64
        Shape (n,), 0 to 9.
    test_images : array of uint8
        The same for testing.
    test_labels : array of int64
        The same for testing.

    Raises
    ------
    InputError
        A file is missing, cannot be read, or is not of CIFAR-10. The message names it.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hpcavg.data import cifar10
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = cifar10.synthesize(Path(folder), scale=0.002, seed=0)
    ...     images, labels, *_ = cifar10.load(path)
    >>> images.shape, labels.shape
    ((100, 3, 32, 32), (100,))
    """
    found, version = _find(folder)
    read = _read_binary if version == "binary" else _read_python
    parts = [read(found / file_name(name, version)) for name in (*TRAIN, TEST)]
    train_images, train_labels = (np.concatenate(arrays) for arrays in zip(*parts[:-1], strict=True))
    return train_images, train_labels, *parts[-1]


def file_name(batch: str, version: str) -> str:
    """Return the name of a batch's file; `version` is ``binary`` or ``python``."""
    return f"{batch}.bin" if version == "binary" else batch


def _find(folder: Path) -> tuple[Path, str]:
    """Return the folder that holds files of the data set, and their version."""
    for version, name in FOLDERS.items():
        for candidate in (folder, folder / name):
            if any((candidate / file_name(batch, version)).exists() for batch in (*TRAIN, TEST)):
                return candidate, version
    layout = f"{FOLDERS['binary']}/{TRAIN[0]}.bin to {TRAIN[-1]}.bin and {TEST}.bin, or {FOLDERS['python']}/{TRAIN[0]}"
    allowed = f"a folder with the files of CIFAR-10, {layout} to {TRAIN[-1]} and {TEST}, from {WHERE}"
    raise InputError("data_dir", str(folder), f"{allowed}; python -m hpcavg data synthesize cifar10 writes such files")


def _read_binary(path: Path) -> tuple[Images, Labels]:
    data = _bytes_of(path)
    if not data or len(data) % _RECORD:
        raise _wrong(path, f"it has {len(data)} bytes")
    records = np.frombuffer(data, np.uint8).reshape(-1, _RECORD)
    return _checked(path, records[:, 1:], records[:, 0].tolist())


def _read_python(path: Path) -> tuple[Images, Labels]:
    data = _bytes_of(path)
    try:
        values = _pickled_values(data)
        pixels, labels = _pixels(values["data"]), values["labels"]
    except ValueError as error:
        raise _wrong(path, f"it cannot be read safely: {reason(error)}") from error
    if not labels or not values["data"]:
        raise _wrong(path, "it has no data or no labels")
    if pixels is None:
        raise _wrong(path, "its data are not a uint8 array of two axes in C order")
    if pixels.shape[1] != _PIXELS or not len(pixels):
        raise _wrong(path, f"its data are of shape {pixels.shape}")
    if not all(type(label) is int for label in labels):
        raise _wrong(path, "its labels are no integers")
    if len(labels) != len(pixels):
        raise _wrong(path, "its labels are not one for each image")
    return _checked(path, pixels, labels)


def _pickled_values(data: bytes) -> dict[str, list[Any]]:
    """Return the numbers and texts in a pickled dict by the key that they follow.

    The dict is not unpickled: ``pickletools`` lists the instructions and checks lengths, but nothing is imported or
    called, whatever the file says. Raises `ValueError` for a damaged or endless pickle.
    """
    values: dict[str, list[Any]] = {key: [] for key in _KEYS}
    key = _KEYS[0]
    for count, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if count == _MAX_INSTRUCTIONS:
            raise ValueError(f"more than {count} instructions")
        if opcode.name in _CONSTANTS:
            values[key].append(_CONSTANTS[opcode.name])
        elif opcode.name in _LITERALS and value in _KEY_OF:
            key = _KEY_OF[value]
        elif opcode.name in _LITERALS and value not in _NUMPY_NAMES:
            values[key].append(value)
    return values


def _pixels(values: list[Any]) -> NDArray[np.uint8] | None:
    """Return the array of which NumPy has pickled these values; None unless it is uint8 with two axes in C order."""
    match values:
        # An empty array of type "b"; the version, 1; shape, dtype, whether the order is Fortran's, and the bytes.
        case [0, "b" | b"b", 1, int(rows), int(columns), "u1", *_, False, (str() | bytes()) as content]:
            data = content.encode("latin-1") if isinstance(content, str) else content  # Python 2 has bytes as text
            return np.frombuffer(data, np.uint8).reshape(max(rows, 0), max(columns, 0))
    return None


def _bytes_of(path: Path) -> bytes:
    try:
        with files.open_file(path) as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise _wrong(path, f"it cannot be read ({reason(error)})") from error
    if len(data) > _MAX_BYTES:
        raise _wrong(path, f"it has more than {_MAX_BYTES} bytes")
    return data


def _checked(path: Path, pixels: NDArray[np.uint8], labels: Sequence[int]) -> tuple[Images, Labels]:
    if min(labels) < 0 or max(labels) >= NUM_CLASSES:
        raise _wrong(path, "some of its labels are not 0 to 9")
    return pixels.reshape(-1, *SHAPE), np.array(labels, np.int64)


def _wrong(path: Path, but: str) -> InputError:
    if path.suffix == ".bin":
        form = f"records of {_RECORD} bytes, a label of 0 to 9 and 3 x 32 x 32 pixels, 10,000 of them in the original"
    else:
        arrays = "data, a uint8 array of shape (n, 3072), and labels, n integers of 0 to 9"
        form = f"a pickled dict of {arrays}; n is 10,000 in the original"
    return InputError("data_dir", str(path), f"a file of CIFAR-10, {form}; {but}; the original is at {WHERE}")


def synthesize(folder: Path, scale: float, seed: int, version: str = "binary") -> Path:
    """Write the six files with synthetic images that can be learned.

    An image is the smooth pattern of its class, shifted by a few pixels, and noise.

    Parameters
    ----------
    folder : Path
        The data set becomes a folder in it, named as in the original archive.
    scale : float
        The number of images, as a multiple of the original's; a file has at least 20.
    seed : int
        The same seed gives the same files.
    version : {"binary", "python"}
        The form of the files.

    Returns
    -------
    Path
        The folder with the files.

    Raises
    ------
    InputError
        The data set is there already.
    OSError
        The files cannot be written.
    """
    target = folder / FOLDERS[version]
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("data_dir", str(folder), f"a folder without {target.name}, which is never overwritten")
    target.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    coarse = generator.uniform(-1, 1, (NUM_CLASSES, 3, 8, 8))
    patterns = coarse.repeat(4, axis=2).repeat(4, axis=3)
    num_images = max(2 * NUM_CLASSES, round(scale * IMAGES_PER_FILE))
    for name in (*TRAIN, TEST):
        labels = generator.permutation(np.arange(num_images) % NUM_CLASSES)
        pixels = np.concatenate(
            [_images(patterns[part], generator) for part in np.array_split(labels, num_images // 20)]
        )
        content = _binary(pixels, labels) if version == "binary" else _pickled(pixels, labels, name)
        files.replace_file(target / file_name(name, version), content)
    return target


def _images(patterns: NDArray[np.float64], generator: np.random.Generator) -> NDArray[np.uint8]:
    """Return noisy images, shape (n, 3072), of the `patterns`, shape (n, 3, 32, 32)."""
    moved = [np.roll(pattern, generator.integers(-2, 3, 2), axis=(1, 2)) for pattern in patterns]
    noise = generator.standard_normal(patterns.shape)
    return (128 + 40 * np.stack(moved) + 40 * noise).clip(0, 255).astype(np.uint8).reshape(-1, _PIXELS)


def _binary(pixels: NDArray[np.uint8], labels: Labels) -> Iterator[bytes]:
    yield np.column_stack([labels.astype(np.uint8), pixels]).tobytes()


def _pickled(pixels: NDArray[np.uint8], labels: Labels, name: str) -> Iterator[bytes]:
    """Yield the pickle of a batch. Keys and texts are bytes, as Python 2 wrote them."""
    names = [b"synthetic_%06d.png" % number for number in range(len(labels))]
    values = {b"batch_label": name.encode(), b"labels": labels.tolist(), b"data": pixels, b"filenames": names}
    yield pickle.dumps(values, protocol=2)
