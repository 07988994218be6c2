"""Agreement of all learners on a step after which they pause together: to write a checkpoint, or to stop.

Learners run freely between means, and a signal reaches them at different steps. A learner that stopped at once would
leave others waiting for it in a mean. So their supervisors' threads agree, while training goes on:

1. A rank with a request tells rank 0, whose thread wakes all others. Nobody is held up until all of them are awake.
2. Each thread then holds its main thread back at the end of the step that it is taking, and tells rank 0 which step
   that is. The threads answer even while their main threads are inside a mean, so this takes milliseconds.
3. Rank 0 tells all of them the largest of these steps, and they go on to its end.

All can get there: a rank that waits in a mean of step m has said m, so those it waits for go on to m at least. Where
ranks die meanwhile, survivors tell each other the step, as some may know it already, or stand there.

Servers take no steps and no part; what they are asked for they pass on to rank 0.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from mpi4py import MPI

from hpcavg.distributed.signals import is_second_signal
from hpcavg.distributed.supervisor import Supervisor
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError

# How often a thread looks for messages while an agreement is under way.
_ACTIVE_S = 0.002


class PauseKind(IntEnum):
    """What to pause for; where several things are asked for at once, the largest."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2


class Pause(NamedTuple):
    """What is asked for, or agreed on, and why, in a few words."""

    kind: PauseKind
    reason: str


class Deadline(NamedTuple):
    """When to ask for a stop, in seconds of `time.monotonic`, and why."""

    time_s: float
    reason: str


_NONE = Pause(PauseKind.NOTHING, "")


def deadline(
    now_s: float,
    epoch_s: float,
    age_s: float,
    stop_after_s: float | None,
    stop_margin_s: float,
    environment: Mapping[str, str],
) -> Deadline | None:
    """Return the earlier of `stop_after_s` after the start and `stop_margin_s` before the end of the Slurm job.

    The wall clock is read once, for the latter: it may be set meanwhile.

    now_s, epoch_s : now, of `time.monotonic` and `time.time`. age_s : since the start. stop_after_s : None for no such
    limit. environment : Slurm's ``SLURM_JOB_END_TIME`` is looked for here. None where there is no limit. Raises
    `InputError` where the variable is no time.
    """
    found = []
    if stop_after_s is not None:
        found.append(Deadline(now_s - age_s + stop_after_s, f"--stop-after {stop_after_s:g}"))
    end = environment.get("SLURM_JOB_END_TIME")
    if end is not None:
        if not end.isdecimal():
            raise InputError("SLURM_JOB_END_TIME", end, "a time in seconds since 1970")
        found.append(Deadline(now_s + int(end) - epoch_s - stop_margin_s, f"the Slurm job ends in {stop_margin_s:g} s"))
    return min(found, default=None)


class Pauses:
    """Agreement on pauses, seen from one rank: call `end_step` after every step.

    Parameters
    ----------
    supervisor : the thread of this rank.
    topology : the learners that agree.
    step : steps taken so far.
    stop_at : when to ask for a stop.
    catch_signals : SIGUSR1, SIGTERM and SIGINT ask for a stop. A second SIGTERM or SIGINT, a second or more later, ends
        the process at once with status 128 + its number. A SIGINT that is ignored, as in the background of a shell, or
        handled by the program stays so. Main thread only.
    by_step : whether all ranks take the same means at the same steps. If not, nothing is agreed on by steps, and the
        loop calls `agree_now` when all of them stand together.
    """

    def __init__(
        self,
        supervisor: Supervisor,
        topology: Topology,
        step: int = 0,
        stop_at: Deadline | None = None,
        catch_signals: bool = False,
        by_step: bool = True,
    ) -> None:
        self._supervisor = supervisor
        self._topology = topology
        self._changed = supervisor.changed
        self._by_step = by_step
        self._stop_at = stop_at
        self._first_signal_s: list[float] = []
        self._next = step + 1  # the next end of a step: the first one at which this rank can be told of a pause
        self._asked = _NONE  # here, and not known to others
        self._given = _NONE  # what this rank brought into the agreement under way
        self._is_known = False  # rank 0 has been told that there is a request here
        self._is_called = False  # rank 0 waits to hear that this thread is awake
        self._is_held = False
        self._is_under_way = False  # from being called until the pause
        self._target: int | None = None
        self._agreed = _NONE
        self._latest: tuple[int, Pause] | None = None  # target and pause that were agreed on last, also when it is over
        # What rank 0 keeps: whether someone asks, and of the agreement it leads, who is awake and who has said what.
        self._is_wanted = False
        self._is_leading = False
        self._num_awake = 0
        self._answers: list[tuple[int, Pause]] = []
        supervisor.step = self._next
        supervisor.add("pauses", self)
        if catch_signals:
            supervisor.on_signal(signal.SIGUSR1, self._on_signal)
            supervisor.on_signal(signal.SIGTERM, self._on_signal)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                supervisor.on_signal(signal.SIGINT, self._on_signal)

    # -- for the loop ---------------------------------------------------------------------------------------------

    def end_step(self, step: int) -> Pause | None:
        """Return the pause that all ranks make after `step`, which has just been taken; None if there is none.

        Every rank gets the same pause after the same step. It is over when this is called after the next step. Waits,
        for milliseconds, while the others say where they are, longer if some of them die. Raises `ValueError` unless
        steps are counted one by one.
        """
        supervisor = self._supervisor
        if supervisor.has_mail():
            supervisor.wake()
        while True:
            with self._changed:
                if step != self._next:
                    raise ValueError(f"step {step} ended where step {self._next} was being taken")
                if not self._is_held:
                    pause = self._arrive() if step == self._target else None
                    self._next = supervisor.step = step + 1
                    break
            self._topology.run_retryable(self._wait_to_go, "agreement on a pause")
        supervisor.step_since = time.monotonic()
        return pause

    def _wait_to_go(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_held or self._supervisor.is_quiet)
            if self._is_held:  # those who died may have been the ones to say how far
                raise MPI.Exception(MPI.ERR_PROC_FAILED)

    def agree_now(self) -> Pause | None:
        """Return the pause that some learner asks for, on all of them; None if none does. Collective over them."""
        topology = self._topology
        asked = max(
            topology.run_collective(lambda: topology.learner_ranks.allgather(self._asked), what="agreement on a pause")
        )
        if asked.kind is PauseKind.NOTHING:
            return None
        with self._changed:
            self._drop(asked.kind)
        return asked

    def request(self, kind: PauseKind, reason: str) -> None:
        """Ask for a pause. Any thread may; one rank is enough, and what is asked for at regular times, best."""
        with self._changed:
            self._asked = max(self._asked, Pause(kind, reason))
        self._supervisor.wake()

    @property
    def requested(self) -> PauseKind:
        """What this rank has been asked for and has not done yet."""
        return max(self._asked, self._given).kind

    def count_from(self, step: int) -> None:
        """Go on from `step` steps taken, where a loop that was restarted after a failure counts anew."""
        with self._changed:
            self._next = self._supervisor.step = step + 1
            self._latest = self._target = None
            self._is_under_way = False

    def _arrive(self) -> Pause:
        """Begin the agreed pause; whatever was asked for meanwhile and is done by it is done."""
        pause = self._agreed
        self._target = None
        self._is_under_way = False
        self._given = _NONE
        self._drop(pause.kind)
        self._supervisor.wake()
        return pause

    def _drop(self, kind: PauseKind) -> None:
        if self._asked.kind <= kind:
            self._asked = _NONE

    # -- for the thread -------------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and is_second_signal(self._first_signal_s):
            if self._topology.survives:  # a launcher that lets ranks die waits for ever where one exits with a status
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(128 + number)
        self.request(PauseKind.STOP, signal.Signals(number).name)

    def look(self, now: float) -> float:
        """See `hpcavg.distributed.supervisor.Part`."""
        wait_s = math.inf
        if self._stop_at is not None:
            wait_s = self._stop_at.time_s - now
            if wait_s <= 0:
                self._asked = max(self._asked, Pause(PauseKind.STOP, self._stop_at.reason))
                self._stop_at, wait_s = None, math.inf
        if self._topology.is_server:
            if self._asked.kind:
                self._send(0, "ask", self._asked)
                self._asked = _NONE
            return wait_s
        if not self._by_step:
            return wait_s
        if self._asked.kind and not self._is_under_way and not self._is_known:
            self._is_known = True
            self._send(0, "request")
        if self._is_called and self._target is None:  # the pause before this one has been made
            self._is_called = False
            self._is_under_way = True
            self._send(0, "awake")
        if self._is_wanted and not self._is_leading:
            self._is_leading = True
            self._send_to_all("wake")
        return min(wait_s, _ACTIVE_S) if self._is_known or self._is_under_way else wait_s

    def receive(self, source: int, *message: Any) -> None:
        """See `hpcavg.distributed.supervisor.Part`."""
        what, *content = message
        getattr(self, f"_receive_{what}")(source, *content)

    def tell(self) -> tuple[int, Pause] | None:
        """See `hpcavg.distributed.supervisor.Part`."""
        return self._latest

    def restart(self, told: Sequence[tuple[int, Pause] | None]) -> None:
        """Requests are kept, and so is a step that was agreed on, if one knows it."""
        self._asked = max(self._asked, self._given)
        self._given = _NONE
        self._is_known = self._is_called = self._is_held = self._is_under_way = False
        self._is_wanted = self._is_leading = False
        self._num_awake = 0
        self._answers.clear()
        self._target = None
        self._latest = max(filter(None, told), default=None)
        if self._latest is not None and self._latest[0] >= self._next:  # where others are or will be
            self._is_under_way = True
            self._target, self._agreed = self._latest
        self._changed.notify_all()

    def _receive_wake(self, source: int) -> None:
        self._is_called = True

    def _receive_hold(self, source: int) -> None:
        self._is_held = True
        self._given, self._asked = self._asked, _NONE
        self._send(0, "step", self._next, self._given)

    def _receive_go(self, source: int, target: int, agreed: Pause) -> None:
        self._is_held = self._is_known = False
        self._target, self._agreed = self._latest = target, agreed
        self._changed.notify_all()

    # -- for the thread of rank 0 ---------------------------------------------------------------------------------

    def _receive_ask(self, source: int, asked: Pause) -> None:
        self._asked = max(self._asked, asked)

    def _receive_request(self, source: int) -> None:
        self._is_wanted = True

    def _receive_awake(self, source: int) -> None:
        self._num_awake += 1
        if self._num_awake == self._size:
            self._num_awake = 0
            self._send_to_all("hold")

    def _receive_step(self, source: int, step: int, asked: Pause) -> None:
        self._answers.append((step, asked))
        if len(self._answers) == self._size:
            steps, requests = zip(*self._answers, strict=True)
            self._answers.clear()
            self._is_leading = self._is_wanted = False  # requests of before are in the answers
            self._send_to_all("go", max(steps), max(requests))

    def _send(self, rank: int, *message: Any) -> None:
        self._supervisor.send("pauses", rank, *message)

    def _send_to_all(self, *message: Any) -> None:
        for rank in range(self._size):
            self._send(rank, *message)

    @property
    def _size(self) -> int:
        """How many ranks agree; fewer after some have died."""
        return self._supervisor.size - self._topology.num_servers
