"""What the launcher and the scheduler say of this process in its environment, without MPI."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping

from hpcavg.distributed import launchers
from hpcavg.errors import InputError, require_integer

_SCHEDULERS = {"SLURM_JOB_ID": "Slurm", "LSB_JOBID": "LSF", "PBS_JOBID": "PBS"}

_START = "start with mpirun or srun --mpi=pmix, with the MPI that mpi4py was built for"
_CURE = f"{_START} (--expect-ranks 1 if meant)"

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

    for number in _REQUESTS:
        signal.signal(number, remember)
    hold_back_at_forks(_REQUESTS, be_a_child)


def hold_back_at_forks(numbers: Iterable[int], be_a_child: Callable[[], None]) -> None:
    """Hold signals of these `numbers` back, from now on, while a process is forked off.

    One that a child got before `be_a_child` has given it handlers of its own would be lost.
    """

    def let_them_come() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def begin() -> None:
        be_a_child()
        let_them_come()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers),
        after_in_parent=let_them_come,
        after_in_child=begin,
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
    told = launchers.rank_told(os.environ)
    return 0 if told is None else told[1]


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
    return _state_and_start(pid)[1]


def process_age_s() -> float:
    """Return the seconds since this process was started; interpreter and imports are included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_ticks(os.getpid()) / os.sysconf("SC_CLK_TCK")


def _state_and_start(pid: int) -> tuple[str, int]:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def is_running(pid: int, ticks: int) -> bool | None:
    """Return whether the process `pid` that was started then runs on this host; None where that may not be known."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's, of whom /proc may show nothing
        pass
    try:
        state, started = _state_and_start(pid)
    except OSError:
        return None
    return state not in ("Z", "X") and started == ticks  # one that has ended may wait long to be buried


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
    """Raise `InputError` when the launcher, or the scheduler, meant another number of ranks than MPI sees.

    expected : what the user says of it; None: nothing. See `hpcavg.distributed.launchers`.
    """
    if expected is not None:
        if num_ranks != expected:
            raise InputError("expect_ranks", expected, f"the number of ranks that MPI sees, {num_ranks}; {_CURE}")
        return
    others = launchers.others_told(os.environ, in_allocation=True) if num_ranks == 1 else None
    if others is not None:
        raise InputError("expect_ranks", "unset", f"given, or {others} seen by MPI too: MPI sees 1 alone; {_CURE}")


def check_lone(num_ranks: int) -> None:
    """Raise `InputError` when a program takes all ranks, and MPI sees one of those that a launcher has started.

    One process of a job that has room for several is no mistake of a program's, as it is of the command line's.
    """
    others = launchers.others_told(os.environ, in_allocation=False) if num_ranks == 1 else None
    if others is not None:
        allowed = f"MPI.COMM_SELF if one rank is meant: MPI does not see {others}; {_START}"
        raise InputError("comm", "MPI.COMM_WORLD", allowed)


def require_pmix_server(environ: Mapping[str, str]) -> None:
    """Raise `InputError` for what is left of a PMIx launcher without its server: Open MPI would die of it."""
    for name in ("PMIX_NAMESPACE", "PMIX_RANK"):
        if name in environ and not any(other.startswith("PMIX_SERVER_URI") for other in environ):
            raise InputError(name, environ[name], f"unset where no PMIX_SERVER_URI is: no launcher's; {_START}")
