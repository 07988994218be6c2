"""Arrays that the ranks of one node hold once, in memory they share."""

from __future__ import annotations

import math
import mmap
import os
import tempfile
from typing import NamedTuple

import numpy as np
from mpi4py import MPI
from numpy.typing import NDArray

_FOLDERS = ("/dev/shm", tempfile.gettempdir())


class _Segment(NamedTuple):
    path: str
    shape: tuple[int, ...]
    dtype: str


def share_array(node: MPI.Comm, array: NDArray[np.generic] | None) -> NDArray[np.generic]:
    """Return rank 0's `array` on every rank of `node`, in memory that all of them map.

    `array` is read on rank 0 of `node` only; the others pass None. The segment's name is removed before this returns,
    so nothing is left behind however the job ends. Raises OSError on every rank where no folder has the room.
    """
    descriptor, segment, error = -1, None, None
    if node.Get_rank() == 0:
        assert array is not None
        try:
            descriptor, path = _create_file(array.nbytes)
            segment = _Segment(path, array.shape, array.dtype.str)
        except OSError as raised:
            error = str(raised)
    segment, error = node.bcast((segment, error), root=0)
    if error is not None or segment is None:
        raise OSError(error)
    if descriptor < 0:
        descriptor = os.open(segment.path, os.O_RDWR)
    num_bytes = math.prod(segment.shape) * np.dtype(segment.dtype).itemsize
    memory = mmap.mmap(descriptor, max(num_bytes, 1))
    os.close(descriptor)
    shared = np.frombuffer(memory, dtype=segment.dtype, count=math.prod(segment.shape)).reshape(segment.shape)
    if array is not None and node.Get_rank() == 0:
        shared[...] = array
    node.Barrier()  # all have it mapped, and it is filled
    if node.Get_rank() == 0:
        os.unlink(segment.path)
    return shared


def _create_file(num_bytes: int) -> tuple[int, str]:
    """Create a file of `num_bytes` with its room reserved, so that a full disk is an error and not a bus error."""
    for folder in _FOLDERS:
        try:
            descriptor, path = tempfile.mkstemp(prefix="hpcavg-", dir=folder)
        except OSError:
            continue
        try:
            os.posix_fallocate(descriptor, 0, max(num_bytes, 1))
            return descriptor, path
        except OSError:
            os.close(descriptor)
            os.unlink(path)
    raise OSError(f"no room for {num_bytes} bytes shared by the ranks of a node in {' or '.join(_FOLDERS)}")
