"""Child processes of a rank, such as the workers of a DataLoader: they inherit its environment, but must not use MPI.

Light to import: the package imports this module first.
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
    """Keep MPI from starting in every child of a rank: spawned, forked, the forkserver and its children."""
    os.register_at_fork(after_in_child=_after_fork)
    # The commands of spawned children and of the forkserver start with `python -c "from multiprocessing.`.
    is_of_multiprocessing = any(word.startswith("from multiprocessing.") for word in sys.orig_argv)
    if is_of_multiprocessing and _has_rank():
        _disable_mpi()


def require_rank() -> None:
    """Raise `RuntimeError` in a child of a rank: only the rank uses MPI."""
    if _is_child:
        raise RuntimeError(
            "this process was started by a rank, through multiprocessing or os.fork, and has no MPI of its own: make"
            ' Topology and Averager in the rank, below `if __name__ == "__main__":`, and use neither in workers'
        )


def _has_rank() -> bool:
    """Return whether the environment is that of a rank."""
    found = launcher_variables.rank_variable(os.environ)
    return found is not None and found[0] != "SLURM_PROCID"  # set in the process of a batch script, too


def _disable_mpi() -> None:
    global _is_child
    _is_child = True
    if "mpi4py.MPI" not in sys.modules:
        import mpi4py

        mpi4py.rc.initialize = mpi4py.rc.finalize = False


def _after_fork() -> None:
    """Disable MPI in a forked child, and the hook that ends the job: in a child, MPI_Abort never returns."""
    if "mpi4py.MPI" in sys.modules or _has_rank():
        _disable_mpi()
    import threading

    if getattr(sys.excepthook, "__module__", None) == "hpcavg.distributed.abort":
        sys.excepthook = _end_alone
    if getattr(threading.excepthook, "__module__", None) == "hpcavg.distributed.abort":
        threading.excepthook = threading.__excepthook__


def _end_alone(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an uncaught exception and end this process at once: a normal exit would finalize MPI."""
    sys.__excepthook__(error_type, error, trace)
    streams.flush()
    os._exit(1)
