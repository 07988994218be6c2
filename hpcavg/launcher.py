"""What the launcher and the scheduler say of this process in its environment, without MPI."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

from hpcavg.errors import InputError, require_integer

_LAUNCHER_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS")
_LAUNCHER_RANKS = ("OMPI_COMM_WORLD_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK", "PMIX_RANK", "SLURM_PROCID")

# By what only they set, and in this order: mpirun inside a Slurm job has the job's variables, too.
_LAUNCHERS = {
    "JSM_NAMESPACE_SIZE": "jsrun",
    "PRTE_LAUNCHED": "mpirun",
    "OMPI_UNIVERSE_SIZE": "mpirun",
    "HYDI_CONTROL_FD": "mpirun",
    "SLURM_STEP_ID": "srun",
}
_SCHEDULERS = {"SLURM_JOB_ID": "Slurm", "LSB_JOBID": "LSF", "PBS_JOBID": "PBS"}

_REQUESTS = (signal.SIGUSR1, signal.SIGTERM)
_SAME_SIGNAL_S = 1.0
_early_signals: list[signal.Signals] = []
_told_s: list[float] = []


def remember_early_signals() -> None:
    """From now on, take SIGUSR1 and SIGTERM for requests that whoever handles them later finds in `early_signals`.

    A second SIGTERM, a second or more after the first, ends the process at once.
    """
    own = os.getpid()

    def remember(number: int, frame: object) -> None:
        # A process forked off may have this handler from whoever had the signals meanwhile and has given them back.
        if os.getpid() != own or (number == signal.SIGTERM and is_ordered_to_leave(_told_s)):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            _early_signals.append(signal.Signals(number))

    def be_a_child() -> None:
        for number in _REQUESTS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS)

    for number in _REQUESTS:
        signal.signal(number, remember)
    os.register_at_fork(  # what a child gets before it has handlers of its own would be lost
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _REQUESTS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _REQUESTS),
        after_in_child=be_a_child,
    )


def is_ordered_to_leave(told_s: list[float]) -> bool:
    """Return whether a SIGTERM or SIGINT that came now is a second one; `told_s` keeps the time of the first.

    Launcher and scheduler may both pass one on: what follows within a second is the same.
    """
    now = time.monotonic()
    told_s[:] = told_s or [now]
    return now - told_s[0] > _SAME_SIGNAL_S


def early_signals() -> list[signal.Signals]:
    """Return the requests that came while the program was starting."""
    return list(_early_signals)


def launcher_rank() -> int:
    """Return this process's rank as its launcher tells it, without MPI; 0 where no launcher does."""
    return next((int(os.environ[name]) for name in _LAUNCHER_RANKS if os.environ.get(name, "").isdecimal()), 0)


def launcher_name(environ: Mapping[str, str]) -> str:
    """Return what started the ranks: mpirun, srun, jsrun, or none that is known."""
    return next((name for variable, name in _LAUNCHERS.items() if variable in environ), "none")


def scheduler_job(environ: Mapping[str, str]) -> str | None:
    """Return the scheduler and the number of its job that this process is in, such as ``"Slurm job 17"``."""
    jobs = (f"{name} job {environ[variable]}" for variable, name in _SCHEDULERS.items() if environ.get(variable))
    return next(jobs, None)


def cores_given(environ: Mapping[str, str], host: str) -> int | None:
    """Return how many of the cores of `host` the scheduler gave to the job; None where none says."""
    given = _leading_number(environ.get("SLURM_CPUS_ON_NODE"))
    if given is None:
        words = environ.get("LSB_MCPU_HOSTS", "").split()  # host cores host cores ...
        pairs = zip(words[::2], words[1::2], strict=False)
        given = {name.partition(".")[0]: _leading_number(number) for name, number in pairs}.get(host.partition(".")[0])
    return given


def threads_allowed(environ: Mapping[str, str]) -> int | None:
    """Return the most threads that the job script lets a rank have; None where it does not say."""
    said = (_leading_number(environ.get(name)) for name in ("SLURM_CPUS_PER_TASK", "OMP_NUM_THREADS"))
    return min((number for number in said if number is not None), default=None)


def _leading_number(text: str | None) -> int | None:
    """Return the positive number that `text` starts with, as in OMP_NUM_THREADS=4,2; None for anything else."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) else None


def started_ticks(pid: int) -> int:
    """Return when a process of this host was started, in clock ticks since the host was; raises `OSError`."""
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def check_sizes(num_ranks: int, group_size: int | None, num_servers: int) -> None:
    """Raise `InputError` where `num_ranks` cannot be split so."""
    if num_servers >= num_ranks:
        raise InputError("num_servers", num_servers, f"below the number of ranks, {num_ranks}: some must learn")
    require_integer("num_servers", num_servers, 0)
    most = num_ranks - num_servers
    is_integer = isinstance(group_size, int) and not isinstance(group_size, bool)
    if group_size is not None and not (is_integer and 1 <= group_size <= most):
        allowed = f"an integer of at least 1 and at most {most}, the number of learners"
        raise InputError("group_size", group_size, allowed)


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
