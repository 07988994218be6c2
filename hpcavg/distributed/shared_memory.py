"""Memory that the ranks of a node share."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

_PREFIX = "hpcavg-"
# A file that is younger may belong to a process in another container, which /proc does not show.
_LEFTOVER_AGE_S = 60.0

MEMORY = ("/dev/shm",)
"""Folders for `map_shared_memory`, in order of preference."""

MEMORY_OR_DISK = (*MEMORY, tempfile.gettempdir())
"""Folders for data that may also be in the page cache of a disk."""


def map_shared_memory(node: MPI.Comm, num_bytes: int, folders: tuple[str, ...] = MEMORY) -> mmap.mmap:
    """Return zeroed memory that every rank of `node` maps. Collective over `node`.

    The file of the memory is unlinked before this function returns, so no file remains, however the job ends. Files of
    processes that died inside this function are removed.

    Parameters
    ----------
    node : the ranks of a node.
    num_bytes : size of the memory; rank 0's counts.
    folders : folders for the file, in order of preference.

    Returns
    -------
    mmap.mmap
        The memory.

    Raises
    ------
    OSError
        On every rank, if no folder has room, or if one rank cannot map the memory.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> len(map_shared_memory(MPI.COMM_SELF, 4096))
    4096
    """
    descriptor, path, error = -1, "", None
    if node.Get_rank() == 0:
        try:
            descriptor, path = _create_file(num_bytes, folders)
        except OSError as raised:
            error = str(raised)
    own_path, memory = path, None
    try:
        num_bytes, path, error = node.bcast((num_bytes, path, error), root=0)
        if error is not None:
            raise OSError(error)
        try:
            descriptor = os.open(path, os.O_RDWR) if descriptor < 0 else descriptor
            memory = mmap.mmap(descriptor, max(num_bytes, 1))
        except OSError as raised:
            error = str(raised)
        # After this, all ranks have opened the file, or one cannot.
        errors = [found for found in node.allgather(error) if found is not None]
    finally:  # also if MPI reports that a rank has died
        if descriptor >= 0:
            os.close(descriptor)
        if own_path:
            os.unlink(own_path)
    if errors:
        raise OSError(f"memory of the node that not all of its ranks can map ({errors[0]})")
    assert memory is not None
    return memory


def share_array(node: MPI.Comm, array: NDArray[np.generic] | None) -> NDArray[np.generic]:
    """Return rank 0's `array` on every rank of `node`, in shared memory. Collective over `node`.

    Parameters
    ----------
    node : the ranks of a node.
    array : the array, on rank 0; other ranks pass None.

    Raises
    ------
    OSError
        See `map_shared_memory`.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> share_array(MPI.COMM_SELF, np.arange(3)).tolist()
    [0, 1, 2]
    """
    form = node.bcast(None if array is None else (array.shape, array.dtype.str, array.nbytes), root=0)
    assert form is not None
    shape, dtype, num_bytes = form
    memory = map_shared_memory(node, num_bytes, MEMORY_OR_DISK)
    shared = np.frombuffer(memory, dtype=dtype, count=math.prod(shape)).reshape(shape)
    if array is not None and node.Get_rank() == 0:
        shared[...] = array
    node.Barrier()  # it is filled
    return shared


def _create_file(num_bytes: int, folders: tuple[str, ...]) -> tuple[int, str]:
    """Create a file of `num_bytes` and reserve its space: a full disk then raises `OSError`, not a bus error."""
    for folder in folders:
        _remove_leftovers(folder)
        try:
            descriptor, path = tempfile.mkstemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=folder)
        except OSError:
            continue
        try:
            os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
            return descriptor, path
        except OSError:
            os.close(descriptor)
            os.unlink(path)
    raise OSError(f"no room for {num_bytes} bytes shared by the ranks of a node in {' or '.join(folders)}")


def _remove_leftovers(folder: str) -> None:
    """Remove the files in `folder` that killed processes have left."""
    with suppress(OSError):
        for path in Path(folder).glob(f"{_PREFIX}*-*"):
            pid = path.name[len(_PREFIX) :].partition("-")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _LEFTOVER_AGE_S:
                        path.unlink()
