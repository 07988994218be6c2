"""Finds out whether MPI accepts device memory."""

from __future__ import annotations

import ctypes
import os

from mpi4py import MPI

from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError

OVERRIDE = "HPCAVG_CUDA_AWARE"
_QUERY = "MPIX_Query_cuda_support"


def find_cuda_awareness(topology: Topology) -> tuple[bool, str]:
    """Return whether MPI accepts device memory on all ranks, and the source of this answer. Collective over all ranks.

    The environment variable ``HPCAVG_CUDA_AWARE``, 0 or 1, overrides the answer of MPI.

    Raises
    ------
    InputError
        On every rank, if the variable has another value.
    """
    answers = topology.all_ranks.allgather(topology.run_on_all_ranks(ask_here))
    if len(set(answers)) == 1:
        return answers[0]
    rank, (is_aware, how) = next(
        ((rank, answer) for rank, answer in enumerate(answers) if not answer[0]), (0, answers[0])
    )
    return is_aware, f"{how} on rank {rank}"


def ask_here() -> tuple[bool, str]:
    """Return whether MPI accepts device memory on this rank, and the source of this answer."""
    given = os.environ.get(OVERRIDE)
    if given is not None:
        if given not in ("0", "1"):
            raise InputError(OVERRIDE, given, "0 or 1")
        return given == "1", f"{OVERRIDE}={given}"
    # An extension of Open MPI that other libraries have, too. mpi4py is linked to the library.
    query = getattr(ctypes.CDLL(MPI.__file__), _QUERY, None)
    if query is None:
        return False, f"no {_QUERY} in this MPI library"
    is_aware = bool(query())
    return is_aware, f"{_QUERY} says {int(is_aware)}"
