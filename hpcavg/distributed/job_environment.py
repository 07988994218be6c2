"""What launcher and scheduler report in the environment, and checks of the number of ranks. Without MPI."""

from __future__ import annotations

import os
from collections.abc import Mapping

from hpcavg.distributed import launcher_variables
from hpcavg.errors import InputError, require_integer

_SCHEDULERS = {"SLURM_JOB_ID": "Slurm", "LSB_JOBID": "LSF", "PBS_JOBID": "PBS"}

_START = "start with mpirun or srun --mpi=pmix, with the MPI that mpi4py was built for"
_CURE = f"{_START} (--expect-ranks 1 if meant)"


def launcher_rank() -> int:
    """Return this process's rank from the launcher's variables, without MPI; 0 if there is no launcher."""
    found = launcher_variables.rank_variable(os.environ)
    return 0 if found is None else found[1]


def scheduler_job(environ: Mapping[str, str]) -> str | None:
    """Return the scheduler and the number of this process's job; None outside a job.

    Examples
    --------
    >>> scheduler_job({"SLURM_JOB_ID": "17"})
    'Slurm job 17'
    """
    jobs = (f"{name} job {environ[variable]}" for variable, name in _SCHEDULERS.items() if environ.get(variable))
    return next(jobs, None)


def cores_given(environ: Mapping[str, str], host: str) -> int | None:
    """Return the number of cores of `host` that the scheduler gave to the job; None if it does not say."""
    given = _leading_number(environ.get("SLURM_CPUS_ON_NODE"))
    if given is None:
        words = environ.get("LSB_MCPU_HOSTS", "").split()  # host cores host cores ...
        pairs = zip(words[::2], words[1::2], strict=False)
        given = {name.partition(".")[0]: _leading_number(number) for name, number in pairs}.get(host.partition(".")[0])
    return given


def threads_allowed(environ: Mapping[str, str]) -> int | None:
    """Return the maximum number of threads of a rank in this job script; None if it sets no limit.

    Examples
    --------
    >>> threads_allowed({"SLURM_CPUS_PER_TASK": "8", "OMP_NUM_THREADS": "4"})
    4
    """
    limits = (_leading_number(environ.get(name)) for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"))
    return min((limit for limit in limits if limit is not None), default=None)


def _leading_number(text: str | None) -> int | None:
    """Return the positive number that `text` starts with, as in OMP_NUM_THREADS=4,2; None for anything else."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


# -- checks -------------------------------------------------------------------------------------------------------


def check_sizes(num_ranks: int, group_size: int | None, num_servers: int, learners_per_rank: int = 1) -> None:
    """Raise `InputError` if `num_ranks` cannot be split into these servers and local groups of learners."""
    if num_servers >= num_ranks:
        raise InputError("num_servers", num_servers, f"below the number of ranks, {num_ranks}: some must learn")
    require_integer("num_servers", num_servers, 0)
    require_integer("learners_per_rank", learners_per_rank, 1)
    if group_size is None:
        return
    num_learners = (num_ranks - num_servers) * learners_per_rank
    is_integer = isinstance(group_size, int) and not isinstance(group_size, bool)
    if not (is_integer and 1 <= group_size <= num_learners):
        allowed = f"an integer of at least 1 and at most {num_learners}, the number of learners"
        raise InputError("group_size", group_size, allowed)
    if group_size % learners_per_rank and learners_per_rank % group_size:
        allowed = f"a multiple or a divisor of learners_per_rank, {learners_per_rank}"
        raise InputError("group_size", group_size, allowed)


def check_ranks(num_ranks: int, expected: int | None) -> None:
    """Raise `InputError` if the number of ranks is not what the user, the launcher or the scheduler meant.

    Parameters
    ----------
    num_ranks : the number of ranks that MPI sees.
    expected : the number that the user gave. None: if MPI sees one rank, launcher and scheduler must not show others.
    """
    if expected is not None:
        if num_ranks != expected:
            raise InputError("expect_ranks", expected, f"the number of ranks that MPI sees, {num_ranks}; {_CURE}")
        return
    others = launcher_variables.find_other_ranks(os.environ, in_allocation=True) if num_ranks == 1 else None
    if others is not None:
        raise InputError("expect_ranks", "unset", f"given, or {others} seen by MPI too: MPI sees 1 alone; {_CURE}")


def check_lone(num_ranks: int) -> None:
    """Raise `InputError` if a program uses all ranks and MPI sees one, but a launcher has started several.

    Unlike `check_ranks`, this ignores the scheduler's allocation: a program may use one process of a larger job.
    """
    others = launcher_variables.find_other_ranks(os.environ, in_allocation=False) if num_ranks == 1 else None
    if others is not None:
        allowed = f"MPI.COMM_SELF if one rank is meant: MPI does not see {others}; {_START}"
        raise InputError("comm", "MPI.COMM_WORLD", allowed)


def require_pmix_server(environ: Mapping[str, str]) -> None:
    """Raise `InputError` for variables of a PMIx launcher without the address of its server.

    Open MPI would crash with them.
    """
    for name in ("PMIX_NAMESPACE", "PMIX_RANK"):
        if name in environ and not any(other.startswith("PMIX_SERVER_URI") for other in environ):
            raise InputError(name, environ[name], f"unset without PMIX_SERVER_URI: no launcher is running; {_START}")
