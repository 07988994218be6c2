"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


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
