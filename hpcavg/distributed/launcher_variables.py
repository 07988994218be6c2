"""The table of environment variables by which launchers report ranks. Light to import.

A launcher may start several processes although MPI sees one rank in each. Such ranks would train alone and overwrite
each other's files. There are two causes: launchers that do not use MPI (torchrun), and MPI launchers with a protocol
that mpi4py's library does not speak (``srun --mpi=pmi2`` with Open MPI 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """The variables that one kind of launcher sets. The first variable that is set counts.

    Attributes
    ----------
    name : its name; empty if several launchers set the same variables.
    marks : variables that only this launcher sets.
    ranks : the rank of this process.
    sizes : the number of processes.
    local_sizes : the number of processes on this node.
    needs : variables that must be set, too. Otherwise another program has set the others.
    """

    name: str
    marks: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    local_sizes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


# The innermost launcher first: mpirun inside a Slurm job also sees the job's variables, and srun starts mpirun's
# daemons on other nodes. WORLD_SIZE alone does not count: users set it, and Lightning does for its children.
_TORCH = (("RANK",), ("WORLD_SIZE",), ("LOCAL_WORLD_SIZE",))
LAUNCHERS = (
    Launcher("torchrun", ("TORCHELASTIC_RUN_ID",), *_TORCH, ("TORCHELASTIC_RUN_ID", "RANK")),
    Launcher("", (), *_TORCH, ("LOCAL_RANK", "RANK")),  # deepspeed and other launchers for torch.distributed
    Launcher("jsrun", ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    Launcher(
        "mpirun",  # Open MPI
        ("PRTE_LAUNCHED", "OMPI_UNIVERSE_SIZE"),
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "mpirun",  # MVAPICH2
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "mpirun",  # Hydra: MPICH and its relatives, such as Intel MPI
        ("HYDI_CONTROL_FD", "MPI_LOCALNRANKS"),
        ("PMI_RANK", "MPI_LOCALRANKID"),
        ("PMI_SIZE",),
        ("MPI_LOCALNRANKS",),
    ),
    Launcher("flux run", ("FLUX_TASK_RANK",), ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",)),
    Launcher("mpiexec", ("PALS_RANKID",), ("PALS_RANKID",), (), ("PALS_LOCAL_SIZE",)),  # Cray PALS
    Launcher("aprun", ("ALPS_APP_PE",), ("ALPS_APP_PE",)),
    Launcher("", (), ("PMIX_RANK",)),
    Launcher("srun", ("SLURM_STEP_ID",), ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",)),
)
# The number of tasks of an allocation by sbatch or salloc, in which a launcher need not have started anything.
ALLOCATED = ("SLURM_NTASKS", "SLURM_NPROCS")
RANKS = tuple(dict.fromkeys(name for launcher in LAUNCHERS for name in launcher.ranks))


def rank_variable(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return the variable that holds this process's rank, and the rank; None if no launcher has set one.

    Examples
    --------
    >>> rank_variable({"OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "0"})
    ('OMPI_COMM_WORLD_RANK', 3)
    """
    return next((found for launcher in _possible(environ) for found in _numbers(environ, launcher.ranks)), None)


def find_other_ranks(environ: Mapping[str, str], in_allocation: bool) -> str | None:
    """Return a text that names the variable by which other ranks exist; None if this process is the only rank.

    Parameters
    ----------
    environ : the environment.
    in_allocation : count also the tasks that the scheduler has allocated.

    Examples
    --------
    >>> find_other_ranks({"OMPI_COMM_WORLD_SIZE": "3"}, in_allocation=False)
    'the 3 ranks of OMPI_COMM_WORLD_SIZE'
    """
    for launcher in _possible(environ):
        for name, size in _numbers(environ, launcher.sizes):
            return _several(name, size)
        for name, size in _numbers(environ, launcher.local_sizes):
            if size > 1:
                return _several(name, size)
        for name, rank in _numbers(environ, launcher.ranks):
            if rank > 0:
                return f"the others of {name}={rank}"
    return next((_several(*allocated) for allocated in _numbers(environ, ALLOCATED) if in_allocation), None)


def reports_lone_ranks(environ: Mapping[str, str]) -> bool:
    """Return whether this process, of several that MPI sees as lone ranks, reports the error.

    This is rank 0, or rank 1 if the variables of rank 0 do not show the others.
    """
    found = rank_variable(environ)
    if found is None or found[1] == 0:
        return True
    rank_0 = {name: "0" if name in RANKS else value for name, value in environ.items()}
    return found[1] == 1 and find_other_ranks(rank_0, True) is None


def launcher_name(environ: Mapping[str, str]) -> str:
    """Return the name of the launcher that started this process; ``none`` if no known launcher did."""
    return next((launcher.name for launcher in LAUNCHERS if any(mark in environ for mark in launcher.marks)), "none")


def _possible(environ: Mapping[str, str]) -> Iterator[Launcher]:
    return (launcher for launcher in LAUNCHERS if all(name in environ for name in launcher.needs))


def _numbers(environ: Mapping[str, str], names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield name and value of the first variable that holds a number, if there is one."""
    for name in names:
        if environ.get(name, "").isdecimal():
            yield name, int(environ[name])
            return


def _several(name: str, size: int) -> str | None:
    return f"the {size} ranks of {name}" if size > 1 else None
