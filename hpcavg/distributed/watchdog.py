"""A watchdog for hung ranks: if a rank waits too long, it reports which ranks are missing and what they do.

If a rank waits longer than the timeout, its thread asks the threads of all other ranks what their main threads do, and
collects answers for a few seconds. If several ranks ask at once, the lowest one continues. A rank that has computed for
too long answers, and writes the stacks of its Python threads to standard error. A stopped process does not answer. A
rank that has taken a step or left a wait within the timeout is slow, not hung; a server that waits for slow learners
therefore reports nothing. Before a timeout, no messages are sent.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mpi4py import MPI

from hpcavg.distributed.supervisor import Process, Supervisor, Wait
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError
from hpcavg.utils.streams import print_error
from hpcavg.utils.text import fold_numbers

# The default timeout. The environment variable changes it.
TIMEOUT_S = 600.0
TIMEOUT_VARIABLE = "HPCAVG_HANG_TIMEOUT"

# Time for answers: a thread wakes twice a second, and may have to wait for its core.
_ANSWERS_S = 2.5
# If a thread has not polled for longer, its process or the whole job was stopped. The time beyond this does not count.
_STOPPED_S = 5.0
# Ranks arrive at a mean at about the same time. Their questions are spread over this time.
_SPREAD_S = 0.25


class Answer(NamedTuple):
    """What the main thread of a rank does.

    Clocks differ between hosts. Ranks therefore use `for_s`, not ``wait.since``, of others.

    Attributes
    ----------
    wait : its wait; None if it computes.
    step : its training step.
    for_s : seconds since the wait started; without a wait, since the step started.
    """

    wait: Wait | None
    step: int
    for_s: float


class Watchdog:
    """The watchdog of one rank. It watches the waits that `Supervisor.waiting` registers.

    Parameters
    ----------
    supervisor : the thread of this rank; its ranks watch each other.
    timeout_s : maximum time of a wait, in seconds; 0 for no limit on this rank, which still answers others.
    on_hang : called after every report with the list of missing ranks, by the thread of the rank that reports. The list
        is empty if all ranks have arrived but the wait goes on. It may call `kill`, or end the job. Reports repeat
        every `timeout_s` while the hang lasts.
    """

    def __init__(
        self, supervisor: Supervisor, timeout_s: float = 600.0, on_hang: Callable[[list[int]], None] | None = None
    ) -> None:
        self._supervisor = supervisor
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._quiet_until = self._dumped_s = -math.inf
        self._polled_s = self._not_before_s = time.monotonic()
        self._asked: Wait | None = None  # the wait that this rank asks about
        self._collect_until = math.inf
        self._answers: dict[int, Answer] = {}
        supervisor.add("watchdog", self)

    def kill(self, ranks: Iterable[int]) -> list[int]:
        """Send SIGKILL to `ranks`, if necessary through another rank on the same host. Any thread may call this.

        Returns
        -------
        list of int
            The ranks that cannot be reached, since their hosts have no other rank.
        """
        unreached, ranks = [], set(ranks)
        processes = self._supervisor.processes
        for rank in sorted(ranks):
            others = [other for other, process in enumerate(processes) if process.host == processes[rank].host]
            helpers = [other for other in others if other not in ranks]
            if self._supervisor.rank in others:
                _kill(processes[rank])
            elif helpers:
                self._send(helpers[0], "kill", processes[rank])
            else:
                unreached.append(rank)
        return unreached

    # -- called by the thread -------------------------------------------------------------------------------------

    def poll(self, now: float) -> float:
        """See `hpcavg.distributed.supervisor.Part`."""
        supervisor, wait = self._supervisor, self._supervisor.wait
        stopped_s = now - self._polled_s - _STOPPED_S
        if stopped_s > 0:  # on a busy machine this may happen at every poll; _STOPPED_S of each interval still counts
            self._not_before_s = self._since(wait) + stopped_s
        self._polled_s = now
        if supervisor.is_quiet:
            self._asked = None
            return self._poll_alone(wait, now)
        if self._asked is not None:
            if self._asked is not wait:
                self._asked = None  # the wait has ended
            elif now >= self._collect_until or len(self._answers) == supervisor.size:
                self._conclude(self._asked)
                return 0.0
            else:
                return self._collect_until - now
        if wait is None or not self._timeout_s:
            return math.inf
        spread_s = _SPREAD_S * supervisor.rank / supervisor.size
        due = max(self._since(wait) + self._timeout_s, self._quiet_until) + spread_s
        if now < due:
            return due - now
        self._asked, self._answers, self._collect_until = wait, {}, now + _ANSWERS_S
        for rank in range(supervisor.size):
            self._send(rank, "ask", wait)
        return _ANSWERS_S

    def _poll_alone(self, wait: Wait | None, now: float) -> float:
        """Report a long wait without asking other ranks: a death has cut off their threads."""
        if wait is None or not self._timeout_s:
            return math.inf
        due = max(self._since(wait) + self._timeout_s, self._quiet_until)
        if now < due:
            return due - now
        self._stay_quiet(self._timeout_s)
        here = {self._supervisor.rank: Answer(wait, self._supervisor.step, now - wait.since)}
        text = report(wait, now - wait.since, [], here, self._supervisor.processes)
        self._supervisor.later(lambda: self._act(text, []))
        return self._timeout_s

    def _since(self, wait: Wait | None) -> float:
        """Return the start of `wait`, or of the step if it is None. The time while stopped does not count."""
        return max(wait.since if wait else self._supervisor.step_since, self._not_before_s)

    def receive(self, source: int, *message: Any) -> None:
        """See `hpcavg.distributed.supervisor.Part`."""
        what, *content = message
        getattr(self, f"_receive_{what}")(source, *content)

    def recovery_state(self) -> None:
        """Return nothing; see `hpcavg.distributed.supervisor.Part`."""

    def restart(self, states: Sequence[None]) -> None:
        """Restart all clocks, since waits restart, too; see `hpcavg.distributed.supervisor.Part`."""
        self._asked = None
        self._stay_quiet(self._timeout_s)

    def _receive_ask(self, source: int, asked: Wait) -> None:
        supervisor, now = self._supervisor, time.monotonic()
        wait = supervisor.wait
        for_s = now - self._since(wait)
        self._send(source, "answer", Answer(wait, supervisor.step, for_s))
        if source < supervisor.rank:
            self._asked = None
        if source != supervisor.rank:
            self._stay_quiet(2 * _ANSWERS_S)
            is_late = wait is None and for_s >= self._timeout_s
            if is_late and now > self._dumped_s + 2 * _ANSWERS_S:
                self._dumped_s = now
                supervisor.later(lambda: _dump_stacks(supervisor.rank, asked))

    def _receive_answer(self, source: int, answer: Answer) -> None:
        self._answers[source] = answer

    def _receive_reported(self, source: int) -> None:
        self._asked = None
        self._stay_quiet(self._timeout_s)

    def _receive_kill(self, source: int, process: Process) -> None:
        _kill(process)

    def _stay_quiet(self, duration_s: float) -> None:
        self._quiet_until = max(self._quiet_until, time.monotonic() + duration_s)

    def _conclude(self, wait: Wait) -> None:
        """Evaluate the answers. If ranks hang, report them, inform all ranks and act."""
        answers = self._answers
        missing, quiet_s = missing_ranks(answers, self._timeout_s)
        if quiet_s:
            self._asked = None
            self._stay_quiet(quiet_s)
            return
        waited_s = time.monotonic() - wait.since
        text = report(wait, waited_s, missing, answers, self._supervisor.processes)
        for rank in range(self._supervisor.size):
            self._send(rank, "reported")
        self._asked = None
        self._supervisor.later(lambda: self._act(text, missing))

    def _act(self, text: str, missing: list[int]) -> None:
        print_error(text)
        if self._on_hang is not None:
            self._on_hang(missing)

    def _send(self, rank: int, *message: Any) -> None:
        self._supervisor.send("watchdog", rank, *message)


class Watch:
    """The supervisor and the watchdog of a topology; `watch_over` makes it.

    Parameters
    ----------
    topology : the ranks to watch.
    timeout_s : see `Watchdog`.
    end : ends the job if the run cannot continue without the hung ranks.

    Attributes
    ----------
    supervisor : the thread of this rank; other parts may use it, too.
    """

    def __init__(self, topology: Topology, timeout_s: float, end: Callable[[], None]) -> None:
        self._topology = topology
        self._end = end
        self._killed: set[int] = set()
        self.supervisor = Supervisor(topology.all_ranks)
        self._watchdog = Watchdog(self.supervisor, timeout_s, self._on_hang)
        topology.watch_waits(lambda what, ranks: self.supervisor.waiting(what, None, ranks))
        topology.on_shrink(self._move)

    def close(self) -> None:
        """End the threads of all ranks. Collective over all ranks. May be called twice."""
        self.supervisor.close()

    def abandon(self) -> None:
        """End this rank's thread."""
        self.supervisor.abandon()

    def _move(self) -> None:
        self._killed.clear()
        self.supervisor.move_to(self._topology.all_ranks)

    def _on_hang(self, missing: list[int]) -> None:
        """Kill hung ranks, or end the job. Called by the thread of one rank."""
        # If ranks are missing that were killed before, MPI has not noticed their deaths.
        may_continue = self._topology.survives and not self._killed.issuperset(missing)
        self._killed.update(missing)
        if not may_continue or self._watchdog.kill(missing):
            self._end()


def watch_over(topology: Topology, timeout_s: float, end: Callable[[], None] | None = None) -> Watch:
    """Return the watch of `topology`; the first call makes it and is collective over all ranks.

    Parameters
    ----------
    topology : the ranks to watch.
    timeout_s : maximum time of a wait, in seconds. After it, hung ranks are reported and the job ends. 0 for no limit.
    end : ends the job. None: MPI_Abort with status 1.

    Examples
    --------
    >>> from hpcavg import Topology
    >>> topology = Topology(MPI.COMM_SELF)
    >>> watch_over(topology, timeout_s=600).supervisor.size
    1
    >>> topology.free()
    """
    if topology.watch is None:
        topology.watch = Watch(topology, timeout_s, end or _abort)
    watch: Watch = topology.watch
    return watch


def timeout_or_default(timeout_s: float | None) -> float:
    """Return `timeout_s`. If it is None, return the environment's ``HPCAVG_HANG_TIMEOUT``, or ten minutes if unset.

    Raises
    ------
    InputError
        If the variable is not a number.

    Examples
    --------
    >>> timeout_or_default(20.0)
    20.0
    """
    if timeout_s is None:
        text = os.environ.get(TIMEOUT_VARIABLE, str(TIMEOUT_S))
        try:
            timeout_s = float(text)
        except ValueError:
            raise InputError(TIMEOUT_VARIABLE, text, "a number of seconds, 0 for no limit") from None
    return timeout_s


def _abort() -> None:
    print_error("hpcavg: hung: the job is ended; hang_timeout says after how long")
    MPI.COMM_WORLD.Abort(1)


def missing_ranks(answers: dict[int, Answer], timeout_s: float) -> tuple[list[int], float]:
    """Return the ranks that cause the waits beyond the timeout, and the seconds until the next check.

    The causes are the absent ranks that do not answer or have computed beyond the timeout. If there are none and an
    absent rank has not reached the timeout, that rank is slow, not hung: no rank is returned, and a time above zero.
    If all absent ranks have waited elsewhere beyond the timeout, the program is wrong, and all of them are returned.

    Parameters
    ----------
    answers : the answers, by rank. Ranks that have not answered are missing here.
    timeout_s : maximum time of a wait, in seconds.

    Examples
    --------
    >>> waits = Answer(Wait("global mean", 4, (0, 1), 0.0), 4, 30.0)
    >>> missing_ranks({0: waits}, timeout_s=20.0)
    ([1], 0.0)
    """
    late = [answer.wait for answer in answers.values() if answer.wait and answer.for_s >= timeout_s]
    absent = {rank for wait in late for rank in wait.ranks if rank not in answers or not _is_in(answers[rank], wait)}
    stuck = sorted(rank for rank in absent if rank not in answers or answers[rank].for_s >= timeout_s)
    to_blame = [rank for rank in stuck if rank not in answers or answers[rank].wait is None]
    if to_blame or len(stuck) == len(absent):
        return to_blame or stuck, 0.0
    return [], timeout_s - max(answers[rank].for_s for rank in absent.difference(stuck))


def report(
    wait: Wait, waited_s: float, missing: Sequence[int], answers: dict[int, Answer], processes: Sequence[Process]
) -> str:
    """Return the report on a hang: a line on the waiting ranks, and a line on each missing rank.

    Parameters
    ----------
    wait : the wait.
    waited_s : its duration, in seconds.
    missing : the missing ranks.
    answers : the answers, by rank.
    processes : the processes of all ranks.
    """
    here = [rank for rank, answer in sorted(answers.items()) if _is_in(answer, wait)]
    if not missing:
        fault = "all have arrived, yet it is not done"
    elif any(rank not in answers or answers[rank].wait is None for rank in missing):
        fault = f"missing: {_count(missing)}"
    else:
        fault = f"waiting in other calls: {_count([rank for rank in missing if rank not in here])}"
    lines = [f"hpcavg: hung: {_count(here)} waiting in the {_name(wait)} for {waited_s:.1f} s; {fault}"]
    for rank in missing:
        process, answer = processes[rank], answers.get(rank)
        if answer is None:
            reasons = "stopped, swapped out, in code that holds Python's lock, at its end, or its node is gone"
            does = f"does not answer: {reasons}"
        elif answer.wait is None:
            does = f"is alive, in step {answer.step} for {answer.for_s:.1f} s; see its stacks"
        else:
            does = f"waits in the {_name(answer.wait)} for {answer.for_s:.1f} s"
        lines.append(f"hpcavg: hung: rank {rank} (process {process.pid} on {process.host}) {does}")
    return "\n".join(lines)


def _is_in(answer: Answer, wait: Wait) -> bool:
    return answer.wait is not None and answer.wait[:3] == wait[:3]


def _name(wait: Wait) -> str:
    return str(wait.what) if wait.step is None else f"{wait.what} of step {wait.step}"


def _count(ranks: Sequence[int]) -> str:
    """Return ascending `ranks` as text, with consecutive ranks as a range."""
    return f"rank{'s' if len(ranks) > 1 else ''} {fold_numbers(ranks)}"


def _dump_stacks(rank: int, asked: Wait) -> None:
    """Write the stacks of all threads of this process to standard error."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        print_error(f"hpcavg: hung: rank {rank} is here, while others wait in the {_name(asked)}:\n{file.read()}")


def _kill(process: Process) -> None:
    if process.is_here():
        os.kill(process.pid, signal.SIGKILL)
