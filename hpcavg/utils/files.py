"""Durable changes on disk. Every change is a system call through `perform`, where a test can end the process."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

SMALL_BYTES = 2**24
_READ_BYTES = 2**20


@dataclass(frozen=True)
class FileRecord:
    """What a file must be.

    Attributes
    ----------
    name : without folders.
    num_bytes : its size.
    sha256 : the SHA-256 of its bytes, in hexadecimal.
    """

    name: str
    num_bytes: int
    sha256: str


def perform(call: Callable[..., Any], *arguments: Any) -> Any:
    """Make a system call that changes the file system or waits for the disk. Tests replace this function."""
    return call(*arguments)


def make_folder(path: Path) -> None:
    """Make the folder `path`; raise `FileExistsError` if the name is taken."""
    perform(os.mkdir, path)
    sync_folder(path.parent)


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `chunks` to the new file `path`. The contents are on the disk when this returns.

    The entry in the folder is not: call `sync_folder` once for all new files.

    Parameters
    ----------
    path : Path
        The file.
    chunks : iterable of bytes
        The contents, piece by piece.

    Raises
    ------
    FileExistsError
        The name is taken.
    """
    sha, num_bytes = hashlib.sha256(), 0
    descriptor = perform(os.open, path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        for chunk in chunks:
            rest = memoryview(chunk)
            sha.update(rest)
            num_bytes += len(rest)
            while rest:  # a call writes at most 2 GiB, and less when the disk fills up
                rest = rest[perform(os.write, descriptor, rest) :]
        perform(os.fsync, descriptor)
    finally:
        os.close(descriptor)
    return FileRecord(path.name, num_bytes, sha.hexdigest())


def replace_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write `chunks` to `path`, durably and atomically: an old file keeps the name until the new one is whole.

    The parameters are those of `write_file`.

    Raises
    ------
    OSError
        The file cannot be written, or the name is that of a folder, a pipe or a device.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial = _partial(path)
    try:
        record = write_file(partial, chunks)
        perform(os.replace, partial, path)
    except OSError as error:
        with suppress(OSError):
            perform(os.unlink, partial)
        raise OSError(error.errno, error.strerror, str(path)) from error
    sync_folder(path.parent)
    return FileRecord(path.name, record.num_bytes, record.sha256)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path` as JSON, whole or not at all. NaN and infinity, unknown to JSON, become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    replace_file(path, [(json.dumps(values, indent=2) + "\n").encode()])


def switch_link(path: Path, target: str) -> None:
    """Make the symbolic link `path` point to `target`, durably and atomically."""
    partial = path.with_name(f"{path.name}.partial")
    if partial.is_symlink():  # of a process that was killed
        perform(os.unlink, partial)
    elif os.path.lexists(partial):  # the system would name `target` in its error
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(partial))
    perform(os.symlink, target, partial)
    perform(os.replace, partial, path)
    sync_folder(path.parent)


def _partial(path: Path) -> Path:
    """Return the temporary name for `path`; remove what a killed process has left there."""
    partial = path.with_name(f"{path.name}.partial")
    if os.path.lexists(partial):
        perform(os.unlink, partial)
    return partial


def open_file(path: Path | str) -> BinaryIO:
    """Open the file `path` for reading. Raise `OSError` for a pipe or a device, too: reading one may block."""
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "not a file", str(path))
        return open(path, "rb")
    except ValueError as error:  # a name that no file can have
        raise OSError(errno.EINVAL, str(error)) from error


def read_small(path: Path | str) -> bytes:
    """Return the contents of the file `path`; raise `OSError` if it is larger than `SMALL_BYTES` or not a file."""
    with open_file(path) as file:
        data = file.read(SMALL_BYTES + 1)
    if len(data) > SMALL_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def fault(folder: Path, record: FileRecord) -> str | None:
    """Read a file and return how it differs from its record, in a few words; None if it does not."""
    try:
        with open_file(folder / record.name) as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes != record.num_bytes:
                return f"{record.name} has {num_bytes} bytes and was written with {record.num_bytes}"
            sha = hashlib.sha256()
            while data := file.read(_READ_BYTES):
                sha.update(data)
    except OSError as error:
        return f"{record.name}: {error.strerror}"
    return None if sha.hexdigest() == record.sha256 else f"{record.name} is damaged: its checksum is another"


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Remove the files `names` in `folder`, and then the folder if it is empty.

    A link is removed and not followed. A folder of one of these names stays.
    """
    with os.scandir(folder) as entries:
        found = {entry.name for entry in entries if not entry.is_dir(follow_symlinks=False)}
    for name in names:
        if name in found:
            perform(os.unlink, folder / name)
    try:
        perform(os.rmdir, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


def sync_folder(path: Path) -> None:
    """Wait until the entries of the folder `path` are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        perform(os.fsync, descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)
