"""Arrays that the ranks of one node hold once, in memory they share."""

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
# The processes of other containers cannot be seen; theirs are done with a file long before.
_LEFT_OVER_S = 60.0

MEMORY = ("/dev/shm",)
MEMORY_OR_DISK = (*MEMORY, tempfile.gettempdir())


def map_shared_memory(node: MPI.Comm, num_bytes: int, folders: tuple[str, ...] = MEMORY) -> mmap.mmap:
    """Return `num_bytes` of zeros that every rank of `node` maps. Collective; `num_bytes` is rank 0's.

    The file behind it has lost its name before this returns, so nothing is left behind however the job ends after it.
    What was left by a process that died in here is removed. Raises OSError on every rank where no folder has the room,
    or where one rank cannot map it.
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
        errors = [told for told in node.allgather(error) if told is not None]  # all have mapped it, or one cannot
    finally:  # also where MPI tells that a rank has died
        if descriptor >= 0:
            os.close(descriptor)
        if own_path:
            os.unlink(own_path)
    if errors:
        raise OSError(f"memory of the node that not all of its ranks can map ({errors[0]})")
    assert memory is not None
    return memory


def share_array(node: MPI.Comm, array: NDArray[np.generic] | None) -> NDArray[np.generic]:
    """Return rank 0's `array` on every rank of `node`, in memory that all of them map.

    `array` is read on rank 0 of `node` only; the others pass None. Raises OSError as `map_shared_memory` does.
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
    """Create a file of `num_bytes` with its room reserved, so that a full disk is an error and not a bus error."""
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
    """Remove the files in `folder` of processes that were killed before they could."""
    with suppress(OSError):
        for path in Path(folder).glob(f"{_PREFIX}*-*"):
            pid = path.name[len(_PREFIX) :].partition("-")[0]
            if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
                with suppress(OSError):
                    if time.time() - path.stat().st_mtime > _LEFT_OVER_S:
                        path.unlink()
