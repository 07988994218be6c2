"""Small files: read with a bound, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

MAX_BYTES = 2**24


def read(path: Path) -> bytes:
    """Return what is in the file at `path`.

    Raises OSError where there is none, where it is no ordinary file (a pipe would be waited for, a device need not end)
    or holds more than `MAX_BYTES`.
    """
    if path.exists() and not path.is_file():
        code = errno.EISDIR if path.is_dir() else errno.EINVAL
        raise OSError(code, os.strerror(code) if path.is_dir() else "not an ordinary file", str(path))
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    return data


def write(path: Path, data: bytes) -> None:
    """Write `data` to `path` under a name beside it, which then replaces it. Raises OSError and leaves nothing behind.

    What is there and no ordinary file (a folder, a pipe, a device) is never replaced.
    """
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        error.filename = str(path)
        raise
