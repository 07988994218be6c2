"""What the launcher says of this process in its environment, without MPI."""

from __future__ import annotations

import os
import signal

from hpcavg.errors import InputError

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "PMIX_RANK", "SLURM_PROCID")

_early_signals: list[signal.Signals] = []


def remember_early_signals() -> None:
    """From now on, take SIGUSR1 for a request that whoever handles it later finds in `early_signals`."""
    signal.signal(signal.SIGUSR1, lambda number, frame: _early_signals.append(signal.Signals(number)))


def early_signals() -> list[signal.Signals]:
    """Return the requests that came while the program was starting."""
    return list(_early_signals)


def launcher_rank() -> int:
    """Return this process's rank as its launcher tells it, without MPI; 0 where no launcher does."""
    return next((int(os.environ[name]) for name in _LAUNCHER_RANKS if os.environ.get(name, "").isdecimal()), 0)


def started_ticks(pid: int) -> int:
    """Return when a process of this host was started, in clock ticks since the host was; raises `OSError`."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def check_ranks(num_ranks: int, expected: int | None) -> None:
    """Raise `InputError` when the launcher meant another number of ranks than MPI sees.

    Some launchers start N processes that each believe to be alone (``srun --mpi=pmi2`` under Open MPI 5 does). Each
    would train by itself and overwrite the others' results.
    """
    cure = "start with mpirun or srun --mpi=pmix, with the MPI that mpi4py was built for (--expect-ranks 1 if meant)"
    if expected is not None:
        if num_ranks != expected:
            raise InputError("expect_ranks", expected, f"the number of ranks that MPI sees, {num_ranks}; {cure}")
        return
    for name in _LAUNCHER_SIZES:
        if os.environ.get(name, "").isdecimal():
            if num_ranks == 1 < int(os.environ[name]):
                allowed = f"given, or the {os.environ[name]} ranks of {name} seen by MPI too: MPI sees 1 alone; {cure}"
                raise InputError("expect_ranks", "unset", allowed)
            return
