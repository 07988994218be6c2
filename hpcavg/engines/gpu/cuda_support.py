"""Whether MPI takes device memory, and how that is known."""

from __future__ import annotations

import ctypes
import os

from mpi4py import MPI

from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError

OVERRIDE = "HPCAVG_CUDA_AWARE"
_QUERY = "MPIX_Query_cuda_support"


def find_cuda_awareness(topology: Topology) -> tuple[bool, str]:
    """Return whether MPI takes device memory on all ranks, and how that is known. Collective over all ranks.

    The environment variable HPCAVG_CUDA_AWARE, 0 or 1, has the last word; `InputError` on every rank for other values.
    """
    answers = topology.all_ranks.allgather(topology.run_on_all_ranks(ask_here))
    if len(set(answers)) == 1:
        return answers[0]
    rank, (is_aware, how) = next(
        ((rank, answer) for rank, answer in enumerate(answers) if not answer[0]), (0, answers[0])
    )
    return is_aware, f"{how} on rank {rank}"


def ask_here() -> tuple[bool, str]:
    """Return the same of this rank alone."""
    given = os.environ.get(OVERRIDE)
    if given is not None:
        if given not in ("0", "1"):
            raise InputError(OVERRIDE, given, "0 or 1")
        return given == "1", f"{OVERRIDE}={given}"
    # Open MPI's extension, known to other libraries, too; found through mpi4py, which is linked to the library.
    query = getattr(ctypes.CDLL(MPI.__file__), _QUERY, None)
    if query is None:
        return False, f"no {_QUERY} in this MPI library"
    is_aware = bool(query())
    return is_aware, f"{_QUERY} says {int(is_aware)}"
