"""Processes that a rank starts, such as a DataLoader's workers: they have its environment, and no part in MPI.

Light to import: the package does so first of all.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from hpcavg.distributed import launcher_variables
from hpcavg.utils import streams

if TYPE_CHECKING:
    from types import TracebackType

_is_child = False


def guard() -> None:
    """Keep MPI from starting in a child of a rank: spawned, started by the forkserver, that server, or forked off."""
    os.register_at_fork(after_in_child=_after_fork)
    # Spawned children and the forkserver are `python -c "from multiprocessing..."`, known before anything is imported.
    is_of_multiprocessing = any(word.startswith("from multiprocessing.") for word in sys.orig_argv)
    if is_of_multiprocessing and _is_of_rank():
        _leave_mpi_alone()


def require_rank() -> None:
    """Raise `RuntimeError` in a child of a rank: MPI is the rank's alone."""
    if _is_child:
        raise RuntimeError(
            "this process was started by a rank, through multiprocessing or os.fork, and has no MPI of its own: make"
            ' Topology and Averager in the rank, below `if __name__ == "__main__":`, and use neither in workers'
        )


def _is_of_rank() -> bool:
    found = launcher_variables.rank_variable(os.environ)
    return found is not None and found[0] != "SLURM_PROCID"  # which the one process of a batch script has, too


def _leave_mpi_alone() -> None:
    global _is_child
    _is_child = True
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False


def _after_fork() -> None:
    """Let a child that was forked off fail by itself: through MPI it would wait for ever for the job's end."""
    if "mpi4py.MPI" in sys.modules or _is_of_rank():
        _leave_mpi_alone()
    import threading

    if getattr(sys.excepthook, "__module__", None) == "hpcavg.distributed.abort":
        sys.excepthook = _end_alone
    if getattr(threading.excepthook, "__module__", None) == "hpcavg.distributed.abort":
        threading.excepthook = threading.__excepthook__


def _end_alone(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Tell of an uncaught exception and end this process at once: at an orderly exit it would finalize MPI."""
    sys.__excepthook__(kind, error, trace)
    streams.flush()
    os._exit(1)
