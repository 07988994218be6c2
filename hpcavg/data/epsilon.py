"""epsilon (Pascal large-scale learning challenge, 2008): 2000 features, two classes.

The original is libsvm text of 400,000 training and 100,000 test samples, which takes minutes to read. `prepare` reads
it once, in bounded memory, and writes ``epsilon.h5``: contiguous arrays that every rank of a node maps (`data.mapped`).
"""

from __future__ import annotations

import bz2
import fcntl
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import h5py
import numpy as np
from numpy.typing import NDArray

from hpcavg.data import libsvm
from hpcavg.errors import InputError, reason
from hpcavg.utils import files
from hpcavg.utils.progress import display

NUM_FEATURES = 2000
FILE = "epsilon.h5"
TEXTS = {"train": "epsilon_normalized", "test": "epsilon_normalized.t"}
NUM_SAMPLES = {"train": 400_000, "test": 100_000}
"""The numbers of samples of the original."""
WHERE = "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/binary.html"

_FORMAT = "hpcavg epsilon 1"
_ROWS = 1024  # are read and written at a time: 8 MB
_HDF5_ERRORS = (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError)  # of damaged files
_MAX_LINE = 2**20  # bytes; the original's lines have 31 KB
_INDICES = [b"%d" % index for index in range(1, NUM_FEATURES + 1)]
_MISSING = f"{' and '.join(TEXTS.values())}, each with or without .bz2, from {WHERE}"


# -- text to HDF5 -------------------------------------------------------------------------------------------------


def prepare(source: Path, destination: Path) -> dict[str, int]:
    """Convert the libsvm text in a folder to ``epsilon.h5``.

    A file that was made from texts of the same sizes is kept. The file gets its name when it is complete; the next
    call overwrites what a killed one has left.

    Parameters
    ----------
    source : Path
        The folder with the texts, plain or compressed.
    destination : Path
        The folder for ``epsilon.h5``.

    Returns
    -------
    dict
        The numbers of ``train`` and ``test`` samples.

    Raises
    ------
    InputError
        A text is missing or damaged (the message names file and line), or another process converts into this folder.
    OSError
        The file cannot be written.
    """
    texts = {part: _text(source, name) for part, name in TEXTS.items()}
    sizes = {part: path.stat().st_size for part, path in texts.items()}
    target = destination / FILE
    found = _counts(target, sizes)
    if found is not None:
        return found
    destination.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f"{FILE}.partial")) as partial:
        with h5py.File(partial, "w", locking=False) as file:  # the lock is ours
            file.attrs["format"] = _FORMAT
            for part, path in texts.items():
                group = file.create_group(part)
                group.attrs["source"], group.attrs["source_bytes"] = path.name, sizes[part]
                _convert(path, sizes[part], destination, group)
            counts = {part: len(file[part]["targets"]) for part in TEXTS}
        _sync_file(partial)
        os.replace(partial, target)
        files.sync_folder(destination)
    return counts


def _text(folder: Path, name: str) -> Path:
    """Return the path of the text `name` in `folder`, plain or compressed."""
    for path in (folder / name, folder / f"{name}.bz2"):
        if path.exists():
            if not path.is_file():
                raise InputError("data_dir", str(path), "a file of libsvm text")
            return path
    raise InputError("data_dir", str(folder), f"a folder with {_MISSING}; it has no {name}")


def _counts(path: Path, sizes: dict[str, int]) -> dict[str, int] | None:
    """Return the numbers of samples in the file `path`; None unless it was made from texts of these sizes."""
    with suppress(*_HDF5_ERRORS), h5py.File(path, "r", locking=False) as file:
        if file.attrs["format"] == _FORMAT and all(file[part].attrs["source_bytes"] == sizes[part] for part in TEXTS):
            return {part: len(file[part]["targets"]) for part in TEXTS}
    return None


@contextmanager
def _locked(path: Path) -> Iterator[Path]:
    """Yield `path`, a file that is locked for this process; remove it if the work on it fails."""
    while True:
        with open(path, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                allowed = "a folder in which no other process prepares epsilon at this moment"
                raise InputError("data_dir", str(path.parent), allowed) from error
            except OSError:  # a file system without locks
                path.unlink(missing_ok=True)
                path = path.with_name(f"{path.name}-{platform.node()}-{os.getpid()}")
            else:
                if not _is_still(path, os.fstat(file.fileno())):
                    continue  # another process has just finished: the open file is the data set now
            try:
                yield path
            except BaseException:
                path.unlink(missing_ok=True)
                raise
            return


def _is_still(path: Path, opened: os.stat_result) -> bool:
    """Return whether `path` still names the file that was `opened`."""
    try:
        return os.path.samestat(path.stat(), opened)
    except FileNotFoundError:
        return False


def _convert(path: Path, num_bytes: int, folder: Path, group: h5py.Group) -> None:
    """Write the samples of the text `path` to the arrays ``inputs`` and ``targets`` of `group`.

    Contiguous arrays cannot grow, and the number of samples is known only at the end of the text. Until then the inputs
    are in a temporary file without a name, which ends with this process.
    """
    targets: list[NDArray[np.int64]] = []
    with tempfile.TemporaryFile(dir=folder) as spool:
        with _opened(path) as (text, raw), closing(display(0, num_bytes, what=path.name, in_bytes=True)) as shown:
            done = 0
            for inputs, labels in _read(path, text):
                spool.write(inputs.data)
                targets.append(labels)
                shown.advance(raw.tell() - done)
                done = raw.tell()
            shown.advance(num_bytes - done)
        if not targets:
            raise InputError("data_dir", str(path), "libsvm text with at least one sample")
        all_targets = np.concatenate(targets)
        group.create_dataset("targets", data=all_targets)
        inputs_set = group.create_dataset("inputs", (len(all_targets), NUM_FEATURES), np.float32)
        spool.seek(0)
        for start in range(0, len(all_targets), _ROWS):
            rows = np.frombuffer(spool.read(_ROWS * NUM_FEATURES * 4), np.float32).reshape(-1, NUM_FEATURES)
            inputs_set[start : start + len(rows)] = rows


@contextmanager
def _opened(path: Path) -> Iterator[tuple[IO[bytes], BinaryIO]]:
    """Open the text `path`; yield it, and the file that it is read from."""
    with files.open_file(path) as raw:
        if path.suffix == ".bz2":
            with bz2.open(raw) as text:
                yield text, raw
        else:
            yield raw, raw


def _read(path: Path, text: IO[bytes]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
    """Yield inputs and targets (0 or 1) of `_ROWS` samples at a time. The next inputs overwrite the last."""
    rows = np.empty((_ROWS, NUM_FEATURES), np.float32)
    targets = np.empty(_ROWS, np.int64)
    filled = number = idle = 0
    try:
        while line := text.readline(_MAX_LINE):
            number += 1
            if not line.endswith(b"\n"):
                raise ValueError(f"it is longer than {_MAX_LINE} bytes" if len(line) == _MAX_LINE else "it has no end")
            label = libsvm.read_line(line, rows[filled], _INDICES)
            idle = 0 if label is not None else idle + len(line)
            if idle > _MAX_LINE:  # a few bytes of .bz2 may hold gigabytes of empty lines
                raise ValueError(f"more than {_MAX_LINE} bytes up to its end hold no sample")
            if label is None:
                continue
            if abs(label) != 1:
                raise ValueError(f"its label is {label:g}, neither -1 nor +1")
            targets[filled] = label > 0
            filled += 1
            if filled == _ROWS:
                yield rows, targets.copy()
                filled = 0
    except ValueError as error:
        allowed = f"libsvm text of labels -1 and +1 and {NUM_FEATURES} features; line {number}: {error}"
        raise InputError("data_dir", str(path), allowed) from error
    except (EOFError, OSError) as error:
        allowed = f"libsvm text that can be read to its end ({reason(error)} after line {number})"
        raise InputError("data_dir", str(path), allowed) from error
    if filled:
        yield rows[:filled], targets[:filled]


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- prepared data -----------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """Samples in a file.

    Attributes
    ----------
    path : the file.
    offset : the byte at which the inputs begin: float32, shape (n, 2000), C order.
    targets : 0 or 1, int64, shape (n,).
    """

    path: Path
    offset: int
    targets: NDArray[np.int64]


def locate(folder: Path) -> dict[str, Part]:
    """Return the parts ``train`` and ``test`` of the prepared file in `folder`.

    Raises
    ------
    InputError
        There is no file, or not one that `prepare` has written.
    """
    path = folder / FILE
    if not path.exists():
        command = f"python -m hpcavg data prepare epsilon --data-dir {folder}"
        if any((folder / f"{TEXTS['train']}{end}").exists() for end in ("", ".bz2")):
            raise InputError("data_dir", str(folder), f"a folder with {FILE}, which {command} makes of the text there")
        raise InputError("data_dir", str(folder), f"a folder with {FILE}, which {command} makes of {_MISSING}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            if file.attrs.get("format") != _FORMAT:
                raise _wrong(path, "it is another file")
            return {part: _place(path, file[part]) for part in TEXTS}
    except InputError:
        raise
    except _HDF5_ERRORS as error:
        has_reason = isinstance(error, OSError) and error.errno  # the system's; the others are texts of HDF5
        why = reason(error) if has_reason else "it is cut off or damaged: remove it and prepare it again"
        raise _wrong(path, why) from error


def _place(path: Path, group: Any) -> Part:
    inputs, targets = group["inputs"], group["targets"]
    offset = inputs.id.get_offset()
    if inputs.shape[1:] != (NUM_FEATURES,) or inputs.dtype != np.dtype("<f4") or targets.shape != inputs.shape[:1]:
        raise _wrong(path, "its arrays have another shape or type")
    if offset is None or not inputs.size or offset + inputs.size * 4 > path.stat().st_size:
        raise _wrong(path, "its inputs are not all there")
    labels = targets[:].astype(np.int64)
    if labels.min() < 0 or labels.max() > 1:
        raise _wrong(path, "its targets are not 0 and 1")
    return Part(path, offset, labels)


def _wrong(path: Path, why: str) -> InputError:
    return InputError("data_dir", str(path), f"an HDF5 file as python -m hpcavg data prepare epsilon makes it; {why}")


# -- synthetic ----------------------------------------------------------------------------------------------------


def synthesize(folder: Path, scale: float, seed: int, compress: bool = False) -> list[Path]:
    """Write both texts with synthetic samples that can be learned.

    Rows have unit length, as the original's. A random plane separates the classes, except for noise.

    Parameters
    ----------
    folder : Path
        The folder for the texts.
    scale : float
        The number of samples, as a multiple of the original's; a text has at least 100.
    seed : int
        The same seed gives the same texts.
    compress : bool
        Write the texts as .bz2.

    Returns
    -------
    list of Path
        The texts.

    Raises
    ------
    InputError
        One of the files is there already.
    OSError
        A file cannot be written.

    Examples
    --------
    >>> import tempfile
    >>> from pathlib import Path
    >>> from hpcavg.data import epsilon
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     texts = epsilon.synthesize(Path(folder), scale=1e-4, seed=0)
    >>> [text.name for text in texts]
    ['epsilon_normalized', 'epsilon_normalized.t']
    """
    names = [name + end for name in TEXTS.values() for end in ("", ".bz2")]
    for name in (*names, FILE):
        if (folder / name).exists():
            raise InputError("data_dir", str(folder), f"a folder without {name}, which is never overwritten")
    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(seed)
    normal = draw_plane(generator)
    paths = []
    for part, name in TEXTS.items():
        lines = _lines(draw_samples(max(100, round(scale * NUM_SAMPLES[part])), normal, generator))
        path = folder / f"{name}{'.bz2' if compress else ''}"
        files.replace_file(path, _compressed(lines) if compress else lines)
        paths.append(path)
    return paths


def draw_plane(generator: np.random.Generator) -> NDArray[np.float64]:
    """Return the unit normal of the plane that separates made-up classes, shape (2000,)."""
    normal = generator.standard_normal(NUM_FEATURES)
    return normal / np.linalg.norm(normal)


def draw_samples(
    num_samples: int, normal: NDArray[np.float64], generator: np.random.Generator
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield made-up samples: a label, -1 or 1, and a row of unit length on that side of the plane, except for noise.

    Parameters
    ----------
    num_samples : int
        The number of samples.
    normal : array
        What `draw_plane` returned.
    generator : Generator
        Draws labels and noise.
    """
    for _ in range(num_samples):
        label = 1 if generator.random() < 0.5 else -1
        row = generator.standard_normal(NUM_FEATURES) + 3 * label * normal
        yield label, row / np.linalg.norm(row)


def _lines(samples: Iterator[tuple[int, NDArray[np.float64]]]) -> Iterator[bytes]:
    template = " ".join(f"{index}:%.7g" for index in range(1, NUM_FEATURES + 1)) + "\n"
    for label, row in samples:
        yield f"{label:d} {template % tuple(row.tolist())}".encode()


def _compressed(chunks: Iterator[bytes]) -> Iterator[bytes]:
    compressor = bz2.BZ2Compressor()
    for chunk in chunks:
        yield compressor.compress(chunk)
    yield compressor.flush()
