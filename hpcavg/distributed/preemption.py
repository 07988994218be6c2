"""Agreement of all learners on a step after which they pause together: to write a checkpoint, or to stop.

Learners run freely between means, and a signal reaches them at different steps. If a learner stopped at once, others
would wait for it in a mean. The supervisors' threads therefore agree on a step, while training continues:

1. A rank with a request informs rank 0. Rank 0's thread wakes all others. No training waits until all are awake.
2. Each thread holds its main thread at the end of the current step, and sends the number of this step to rank 0.
   Threads answer even if their main threads are inside a mean; this takes milliseconds.
3. Rank 0 sends the largest of these steps to all ranks. They continue to its end and pause.

All ranks can reach this step: a rank that waits in a mean of step m has sent m, and the ranks that it waits for
continue at least to m. If ranks die meanwhile, the survivors exchange the step: some may know it, or be there already.

Servers take no steps and do not take part in the agreement. They pass requests on to rank 0.
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

# Interval between polls for messages during an agreement.
_POLL_S = 0.002


class PauseKind(IntEnum):
    """The purpose of a pause. Of several requests, the largest counts."""

    NOTHING = 0
    CHECKPOINT = 1
    STOP = 2


class Pause(NamedTuple):
    """A request for a pause, or an agreed pause.

    Attributes
    ----------
    kind : the purpose.
    reason : the reason, in a few words.
    """

    kind: PauseKind
    reason: str


class Deadline(NamedTuple):
    """The time at which a run requests a stop.

    Attributes
    ----------
    time_s : the time, as `time.monotonic`.
    reason : the reason, in a few words.
    """

    time_s: float
    reason: str


_NO_PAUSE = Pause(PauseKind.NOTHING, "")


def deadline(
    now_s: float,
    epoch_s: float,
    age_s: float,
    stop_after_s: float | None,
    stop_margin_s: float,
    environment: Mapping[str, str],
) -> Deadline | None:
    """Return the earlier of `stop_after_s` after the start and `stop_margin_s` before the end of the Slurm job.

    The result is on the monotonic clock: the wall clock may be set during the run.

    Parameters
    ----------
    now_s : the time now, as `time.monotonic`.
    epoch_s : the time now, as `time.time`.
    age_s : seconds since the start.
    stop_after_s : seconds from the start to the stop; None for no such limit.
    stop_margin_s : seconds from the stop to the end of the Slurm job.
    environment : the environment, with Slurm's ``SLURM_JOB_END_TIME`` in a Slurm job.

    Returns
    -------
    Deadline or None
        None if there is no limit.

    Raises
    ------
    InputError
        If ``SLURM_JOB_END_TIME`` is not a time.

    Examples
    --------
    >>> deadline(now_s=5.0, epoch_s=1.7e9, age_s=2.0, stop_after_s=60, stop_margin_s=120, environment={})
    Deadline(time_s=63.0, reason='--stop-after 60')
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
    """The part of one rank in the agreement on pauses. The training loop calls `end_step` after every step.

    Parameters
    ----------
    supervisor : the thread of this rank.
    topology : the learners that agree.
    step : number of steps taken so far.
    stop_at : the time to request a stop.
    catch_signals : SIGUSR1, SIGTERM and SIGINT request a stop. A second SIGTERM or SIGINT, a second or more later, ends
        the process at once with status 128 + its number. SIGINT stays as it is if the program handles it, or if it is
        ignored, as in the background of a shell. Main thread only.
    by_step : whether all ranks take the same means at the same steps. If not, there is no agreement on a step, and the
        loop calls `agree_now` at a point that all ranks reach together.

    Examples
    --------
    >>> from mpi4py import MPI
    >>> from hpcavg import Topology
    >>> from hpcavg.distributed.supervisor import Supervisor
    >>> supervisor = Supervisor(MPI.COMM_SELF)
    >>> pauses = Pauses(supervisor, Topology(MPI.COMM_SELF), by_step=False)
    >>> pauses.request(PauseKind.STOP, "the time is up")
    >>> pauses.agree_now().reason
    'the time is up'
    >>> supervisor.close()
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
        self._next = step + 1  # the step that this rank is taking; it ends at the earliest possible pause
        self._request = _NO_PAUSE  # this rank's request that is in no agreement yet
        self._submitted = _NO_PAUSE  # this rank's request in the current agreement
        self._is_reported = False  # rank 0 knows that this rank has a request
        self._is_called = False  # rank 0 waits for this thread to be awake
        self._is_held = False
        self._is_under_way = False  # from the call to the pause
        self._target_step: int | None = None
        self._agreed_pause = _NO_PAUSE
        self._last_agreement: tuple[int, Pause] | None = None  # step and pause; kept after the pause
        # On rank 0 only: whether a rank has a request, and the state of the current agreement.
        self._is_wanted = False
        self._is_leading = False
        self._num_awake = 0
        self._answers: list[tuple[int, Pause]] = []  # each rank's step and request
        supervisor.step = self._next
        supervisor.add("pauses", self)
        if catch_signals:
            supervisor.on_signal(signal.SIGUSR1, self._on_signal)
            supervisor.on_signal(signal.SIGTERM, self._on_signal)
            if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
                supervisor.on_signal(signal.SIGINT, self._on_signal)

    # -- called by the loop ---------------------------------------------------------------------------------------

    def end_step(self, step: int) -> Pause | None:
        """Return the pause after `step`, the step that has just ended; None if there is none.

        Every rank gets the same pause after the same step. The pause is over at the next call. During an agreement,
        this call waits for milliseconds; it waits longer if ranks die.

        Raises
        ------
        ValueError
            If `step` is not the number of the last call plus one.
        """
        supervisor = self._supervisor
        if supervisor.has_message():
            supervisor.wake()
        while True:
            with self._changed:
                if step != self._next:
                    raise ValueError(f"step {step} ended, but step {self._next} is the current one")
                if not self._is_held:
                    pause = self._begin_pause() if step == self._target_step else None
                    self._next = supervisor.step = step + 1
                    break
            self._topology.run_retryable(self._wait_for_release, "agreement on a pause")
        supervisor.step_since = time.monotonic()
        return pause

    def _wait_for_release(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._is_held or self._supervisor.is_quiet)
            if self._is_held:  # the ranks that died may have been the ones to send the step
                raise MPI.Exception(MPI.ERR_PROC_FAILED)

    def agree_now(self) -> Pause | None:
        """Return the largest request of all learners; None if there is none. Collective over the learners."""
        topology = self._topology
        asked = max(
            topology.run_collective(
                lambda: topology.learner_ranks.allgather(self._request), what="agreement on a pause"
            )
        )
        if asked.kind is PauseKind.NOTHING:
            return None
        with self._changed:
            self._drop_request(asked.kind)
        return asked

    def request(self, kind: PauseKind, reason: str) -> None:
        """Request a pause. Any thread may call this, and one rank is enough.

        Parameters
        ----------
        kind : the purpose.
        reason : the reason, in a few words.
        """
        with self._changed:
            self._request = max(self._request, Pause(kind, reason))
        self._supervisor.wake()

    @property
    def requested(self) -> PauseKind:
        """The purpose of this rank's request that has not led to a pause yet."""
        return max(self._request, self._submitted).kind

    def _begin_pause(self) -> Pause:
        """Begin the agreed pause. It also fulfils newer requests, if they are no larger."""
        pause = self._agreed_pause
        self._target_step = None
        self._is_under_way = False
        self._submitted = _NO_PAUSE
        self._drop_request(pause.kind)
        self._supervisor.wake()
        return pause

    def _drop_request(self, kind: PauseKind) -> None:
        if self._request.kind <= kind:
            self._request = _NO_PAUSE

    # -- called by the thread -------------------------------------------------------------------------------------

    def _on_signal(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT) and is_second_signal(self._first_signal_s):
            if self._topology.survives:  # a launcher that lets ranks die would wait forever for a rank that exits
                os.kill(os.getpid(), signal.SIGKILL)
            os._exit(128 + number)
        self.request(PauseKind.STOP, signal.Signals(number).name)

    def poll(self, now: float) -> float:
        """See `hpcavg.distributed.supervisor.Part`."""
        wait_s = math.inf
        if self._stop_at is not None:
            wait_s = self._stop_at.time_s - now
            if wait_s <= 0:
                self._request = max(self._request, Pause(PauseKind.STOP, self._stop_at.reason))
                self._stop_at, wait_s = None, math.inf
        if self._topology.is_server:
            if self._request.kind:
                self._send(0, "ask", self._request)
                self._request = _NO_PAUSE
            return wait_s
        if not self._by_step:
            return wait_s
        if self._request.kind and not self._is_under_way and not self._is_reported:
            self._is_reported = True
            self._send(0, "request")
        if self._is_called and self._target_step is None:  # the previous pause has begun
            self._is_called = False
            self._is_under_way = True
            self._send(0, "awake")
        if self._is_wanted and not self._is_leading:
            self._is_leading = True
            self._send_to_all("wake")
        return min(wait_s, _POLL_S) if self._is_reported or self._is_under_way else wait_s

    def receive(self, source: int, *message: Any) -> None:
        """See `hpcavg.distributed.supervisor.Part`."""
        what, *content = message
        getattr(self, f"_receive_{what}")(source, *content)

    def recovery_state(self) -> tuple[int, Pause] | None:
        """Return step and pause of the last agreement; see `hpcavg.distributed.supervisor.Part`."""
        return self._last_agreement

    def restart(self, states: Sequence[tuple[int, Pause] | None]) -> None:
        """Keep requests, and the agreed step if any survivor knows it; see `hpcavg.distributed.supervisor.Part`."""
        self._request = max(self._request, self._submitted)
        self._submitted = _NO_PAUSE
        self._is_reported = self._is_called = self._is_held = self._is_under_way = False
        self._is_wanted = self._is_leading = False
        self._num_awake = 0
        self._answers.clear()
        self._target_step = None
        self._last_agreement = max(filter(None, states), default=None)
        if self._last_agreement is not None and self._last_agreement[0] >= self._next:  # other ranks pause there
            self._is_under_way = True
            self._target_step, self._agreed_pause = self._last_agreement
        self._changed.notify_all()

    def _receive_wake(self, source: int) -> None:
        self._is_called = True

    def _receive_hold(self, source: int) -> None:
        self._is_held = True
        self._submitted, self._request = self._request, _NO_PAUSE
        self._send(0, "step", self._next, self._submitted)

    def _receive_go(self, source: int, target: int, agreed: Pause) -> None:
        self._is_held = self._is_reported = False
        self._target_step, self._agreed_pause = self._last_agreement = target, agreed
        self._changed.notify_all()

    # -- called by the thread of rank 0 ---------------------------------------------------------------------------

    def _receive_ask(self, source: int, asked: Pause) -> None:
        self._request = max(self._request, asked)

    def _receive_request(self, source: int) -> None:
        self._is_wanted = True

    def _receive_awake(self, source: int) -> None:
        self._num_awake += 1
        if self._num_awake == self._num_ranks:
            self._num_awake = 0
            self._send_to_all("hold")

    def _receive_step(self, source: int, step: int, asked: Pause) -> None:
        self._answers.append((step, asked))
        if len(self._answers) == self._num_ranks:
            steps, requests = zip(*self._answers, strict=True)
            self._answers.clear()
            self._is_leading = self._is_wanted = False  # the answers contain all earlier requests
            self._send_to_all("go", max(steps), max(requests))

    def _send(self, rank: int, *message: Any) -> None:
        self._supervisor.send("pauses", rank, *message)

    def _send_to_all(self, *message: Any) -> None:
        for rank in range(self._num_ranks):
            self._send(rank, *message)

    @property
    def _num_ranks(self) -> int:
        """Number of ranks that agree; smaller after deaths."""
        return self._supervisor.size - self._topology.num_servers
