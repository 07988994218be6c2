"""A watchdog for hung ranks: who waits in a mean for too long learns which ranks have not come, and what they do.

The thread of a rank that waits longer than the timeout asks the threads of all others where their main threads are, and
collects the answers of a few seconds; of several that ask at once, the lowest one goes on. A rank that has been
computing for too long answers, and writes the stacks of its Python threads to standard error. A stopped process answers
nothing. A rank that has taken a step or left a wait less than the timeout ago is slow, not hung; so a server that waits
for learners only wonders when they do not get on. Until a timeout has passed nobody sends anything.
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

# How long a rank may be waited for unless the program or this variable says otherwise.
TIMEOUT_S = 600.0
TIMEOUT_VARIABLE = "HPCAVG_HANG_TIMEOUT"

# A thread answers when it wakes, which it does twice a second, and when the others on its core let it.
_ANSWERS_S = 2.5
# A thread that has not looked for longer was stopped, with its process or the whole job: the rest does not count.
_ASLEEP_S = 5.0
# Ranks come to a mean at much the same time; their questions should not.
_SPREAD_S = 0.25


class Answer(NamedTuple):
    """Where a rank's main thread is: what it waits for and how long it has, or else for how long it has been in `step`.

    Clocks differ between hosts, so only durations travel; `wait.since` is not used.
    """

    wait: Wait | None
    step: int
    for_s: float


class Watchdog:
    """The watchdog of one rank; what the main thread waits for it is told by `Supervisor.waiting`.

    Parameters
    ----------
    supervisor : whose ranks watch each other.
    timeout_s : how long a rank may wait in one place; 0 asks nobody, but answers others.
    on_hang : called by the thread of the rank that reports, once the report is written, with the ranks that have not
        come. It may call `kill`, or end the job. None are named where all have come and the mean is not done all the
        same. As long as the hang lasts this repeats after every further `timeout_s`.
    """

    def __init__(
        self, supervisor: Supervisor, timeout_s: float = 600.0, on_hang: Callable[[list[int]], None] | None = None
    ) -> None:
        self._supervisor = supervisor
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._quiet_until = self._dumped_s = -math.inf
        self._looked_s = self._not_before_s = time.monotonic()
        self._asked: Wait | None = None  # the wait that this rank asks about
        self._collect_until = math.inf
        self._answers: dict[int, Answer] = {}
        supervisor.add("watchdog", self)

    def kill(self, ranks: Iterable[int]) -> list[int]:
        """Send SIGKILL to `ranks`, through a rank of the same host where they are on another.

        Returns those that nobody can reach: the hosts of which have no other rank. Any thread may call this.
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

    # -- for the thread -------------------------------------------------------------------------------------------

    def look(self, now: float) -> float:
        """See `hpcavg.distributed.supervisor.Part`."""
        supervisor, wait = self._supervisor, self._supervisor.wait
        asleep_s = now - self._looked_s - _ASLEEP_S
        if asleep_s > 0:  # on a busy machine this may be so at every look: some time must pass for all that
            self._not_before_s = self._since(wait) + asleep_s
        self._looked_s = now
        if supervisor.is_quiet:
            self._asked = None
            return self._look_alone(wait, now)
        if self._asked is not None:
            if self._asked is not wait:
                self._asked = None  # they have come after all
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

    def _look_alone(self, wait: Wait | None, now: float) -> float:
        """Do what is due where a death has cut off the other ranks' threads: nobody can be asked."""
        if wait is None or not self._timeout_s:
            return math.inf
        due = max(self._since(wait) + self._timeout_s, self._quiet_until)
        if now < due:
            return due - now
        self._be_quiet(self._timeout_s)
        here = {self._supervisor.rank: Answer(wait, self._supervisor.step, now - wait.since)}
        text = report(wait, now - wait.since, [], here, self._supervisor.processes)
        self._supervisor.later(lambda: self._act(text, []))
        return self._timeout_s

    def _since(self, wait: Wait | None) -> float:
        """Return when `wait` has begun, or else the step; later by the time for which this process was stopped."""
        return max(wait.since if wait else self._supervisor.step_since, self._not_before_s)

    def receive(self, source: int, *message: Any) -> None:
        """See `hpcavg.distributed.supervisor.Part`."""
        what, *content = message
        getattr(self, f"_receive_{what}")(source, *content)

    def tell(self) -> None:
        """See `hpcavg.distributed.supervisor.Part`: nothing."""

    def restart(self, told: Sequence[None]) -> None:
        """See `hpcavg.distributed.supervisor.Part`; means begin anew, and so do their clocks."""
        self._asked = None
        self._be_quiet(self._timeout_s)

    def _receive_ask(self, source: int, asked: Wait) -> None:
        supervisor, now = self._supervisor, time.monotonic()
        wait = supervisor.wait
        for_s = now - self._since(wait)
        self._send(source, "answer", Answer(wait, supervisor.step, for_s))
        if source < supervisor.rank:
            self._asked = None
        if source != supervisor.rank:
            self._be_quiet(2 * _ANSWERS_S)
            is_late = wait is None and for_s >= self._timeout_s
            if is_late and now > self._dumped_s + 2 * _ANSWERS_S:
                self._dumped_s = now
                supervisor.later(lambda: _dump_stacks(supervisor.rank, asked))

    def _receive_answer(self, source: int, answer: Answer) -> None:
        self._answers[source] = answer

    def _receive_reported(self, source: int) -> None:
        self._asked = None
        self._be_quiet(self._timeout_s)

    def _receive_kill(self, source: int, process: Process) -> None:
        _kill(process)

    def _be_quiet(self, duration_s: float) -> None:
        self._quiet_until = max(self._quiet_until, time.monotonic() + duration_s)

    def _conclude(self, wait: Wait) -> None:
        """Report, tell the others that it is done, and act."""
        answers = self._answers
        missing, quiet_s = missing_ranks(answers, self._timeout_s)
        if quiet_s:
            self._asked = None
            self._be_quiet(quiet_s)
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
    """What looks on wherever the ranks of a topology wait for each other; made by `watch_over`.

    Parameters
    ----------
    topology : whose ranks are watched.
    timeout_s : see `Watchdog`.
    end : ends the job where ranks hang that the run cannot part with.

    Attributes
    ----------
    supervisor : the thread of this rank, which other parts may use too.
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
        """End the threads of all ranks. Collective, and safe to call twice."""
        self.supervisor.close()

    def abandon(self) -> None:
        """End this rank's thread."""
        self.supervisor.abandon()

    def _move(self) -> None:
        self._killed.clear()
        self.supervisor.move_to(self._topology.all_ranks)

    def _on_hang(self, missing: list[int]) -> None:
        """Part with ranks that hang, or end the job; on the supervisor's thread of one rank."""
        may_part = self._topology.survives and not self._killed.issuperset(missing)  # MPI may not notice their death
        self._killed.update(missing)
        if not may_part or self._watchdog.kill(missing):
            self._end()


def watch_over(topology: Topology, timeout_s: float, end: Callable[[], None] | None = None) -> Watch:
    """Return what watches over the ranks of `topology`, made at the first call. Collective over all ranks then.

    Parameters
    ----------
    topology : whose ranks are watched.
    timeout_s : seconds after which a rank that others wait for is named and the job ended; 0 for never.
    end : ends the job, in place of MPI_Abort with status 1.
    """
    if topology.watch is None:
        topology.watch = Watch(topology, timeout_s, end or _abort)
    watch: Watch = topology.watch
    return watch


def timeout_or_default(timeout_s: float | None) -> float:
    """Return `timeout_s`; where it is None what the environment says, else ten minutes.

    Raises `InputError` where that is no number.
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
    """Return the ranks that keep those waiting who have waited too long, going by the answers of those who gave one.

    They are those waited for that do not answer, or have been computing for too long. Where there are none, but one
    that is where it is since less than that, it may be slower than others, but is not hung: the seconds for which to
    leave it in peace are returned, too. Where all have waited in different places for too long, nobody is to blame but
    the program, and it is all of them.
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
    """Return the message on ranks `missing`, after `waited_s` in `wait`: who waits, and a line on each of them."""
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
    """Return ascending `ranks` as text, neighbours as a range."""
    return f"rank{'s' if len(ranks) > 1 else ''} {fold_numbers(ranks)}"


def _dump_stacks(rank: int, asked: Wait) -> None:
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        print_error(f"hpcavg: hung: rank {rank} is here, while others wait in the {_name(asked)}:\n{file.read()}")


def _kill(process: Process) -> None:
    if process.is_here():
        os.kill(process.pid, signal.SIGKILL)
