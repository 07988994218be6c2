"""What launchers tell the processes that they start, by variables of the environment. Light to import.

A rank that MPI believes to be alone, while its launcher has started several, would train by itself and overwrite what
the others write. Such ranks come from launchers whose processes find each other without MPI (torchrun), and from
those of MPI that speak another language than the library of mpi4py (``srun --mpi=pmi2`` and Open MPI 5).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class Launcher(NamedTuple):
    """What one kind of launcher sets, each the names of variables, of which the first that is there counts.

    Attributes
    ----------
    name : its name; empty if several launchers set the same.
    marks : variables that only it sets.
    ranks : the number of this process.
    sizes : the number of processes.
    local_sizes : the number of processes on this node.
    needs : variables without which the others were set by something else.
    """

    name: str
    marks: tuple[str, ...] = ()
    ranks: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    local_sizes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()


# The innermost first, where one starts another: mpirun inside a Slurm job has the job's variables, too, and srun starts
# mpirun's daemons on other nodes. WORLD_SIZE alone is set by users, and by Lightning for its own children.
_TORCH = (("RANK",), ("WORLD_SIZE",), ("LOCAL_WORLD_SIZE",))
LAUNCHERS = (
    Launcher("torchrun", ("TORCHELASTIC_RUN_ID",), *_TORCH, ("TORCHELASTIC_RUN_ID", "RANK")),
    Launcher("", (), *_TORCH, ("LOCAL_RANK", "RANK")),  # deepspeed and other launchers for torch.distributed
    Launcher("jsrun", ("JSM_NAMESPACE_SIZE",), ("JSM_NAMESPACE_RANK",), ("JSM_NAMESPACE_SIZE",)),
    Launcher(
        "mpirun",  # of Open MPI
        ("PRTE_LAUNCHED", "OMPI_UNIVERSE_SIZE"),
        ("OMPI_COMM_WORLD_RANK",),
        ("OMPI_COMM_WORLD_SIZE",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "mpirun",  # of MVAPICH2
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_RANK",),
        ("MV2_COMM_WORLD_SIZE",),
        ("MV2_COMM_WORLD_LOCAL_SIZE",),
    ),
    Launcher(
        "mpirun",  # Hydra: of MPICH and its relatives, such as Intel MPI
        ("HYDI_CONTROL_FD", "MPI_LOCALNRANKS"),
        ("PMI_RANK", "MPI_LOCALRANKID"),
        ("PMI_SIZE",),
        ("MPI_LOCALNRANKS",),
    ),
    Launcher("flux run", ("FLUX_TASK_RANK",), ("FLUX_TASK_RANK",), ("FLUX_JOB_SIZE",)),
    Launcher("mpiexec", ("PALS_RANKID",), ("PALS_RANKID",), (), ("PALS_LOCAL_SIZE",)),  # PALS, of Cray
    Launcher("aprun", ("ALPS_APP_PE",), ("ALPS_APP_PE",)),
    Launcher("", (), ("PMIX_RANK",)),
    Launcher("srun", ("SLURM_STEP_ID",), ("SLURM_PROCID",), ("SLURM_STEP_NUM_TASKS",)),
)
# Of jobs in which nothing need have been started by a launcher: of sbatch and salloc.
ALLOCATED = ("SLURM_NTASKS", "SLURM_NPROCS")
RANKS = tuple(dict.fromkeys(name for launcher in LAUNCHERS for name in launcher.ranks))


def rank_told(environ: Mapping[str, str]) -> tuple[str, int] | None:
    """Return this process's rank as its launcher tells it, behind the variable's name; None where no launcher does."""
    return next((told for launcher in _in_force(environ) for told in _of(environ, launcher.ranks)), None)


def others_told(environ: Mapping[str, str], in_allocation: bool) -> str | None:
    """Return in words what tells that this process is not the only one; None where nothing does.

    in_allocation : it is also enough that the scheduler has allocated room for several.
    """
    for launcher in _in_force(environ):
        for name, size in _of(environ, launcher.sizes):
            return _ranks_of(name, size)
        for name, size in _of(environ, launcher.local_sizes):
            if size > 1:
                return _ranks_of(name, size)
        for name, rank in _of(environ, launcher.ranks):
            if rank > 0:
                return f"the others of {name}={rank}"
    return next((_ranks_of(*allocated) for allocated in _of(environ, ALLOCATED) if in_allocation), None)


def speaks_for_lone(environ: Mapping[str, str]) -> bool:
    """Return whether this is the one of several lone ranks that says so: the first that knows of the others."""
    told = rank_told(environ)
    if told is None or told[1] == 0:
        return True
    rank_0 = {name: "0" if name in RANKS else value for name, value in environ.items()}
    return told[1] == 1 and others_told(rank_0, True) is None


def started_by(environ: Mapping[str, str]) -> str:
    """Return the name of what started this process, ``none`` where nobody known did."""
    return next((launcher.name for launcher in LAUNCHERS if any(mark in environ for mark in launcher.marks)), "none")


def _in_force(environ: Mapping[str, str]) -> Iterator[Launcher]:
    return (launcher for launcher in LAUNCHERS if all(name in environ for name in launcher.needs))


def _of(environ: Mapping[str, str], names: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Yield the first of the variables that holds a number, with it."""
    for name in names:
        if environ.get(name, "").isdecimal():
            yield name, int(environ[name])
            return


def _ranks_of(name: str, size: int) -> str | None:
    return f"the {size} ranks of {name}" if size > 1 else None
