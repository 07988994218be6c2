"""One sleeping thread a rank: it hears signals, answers the other ranks' threads, and knows where the main thread is.

A signal handler in Python does not run while the main thread is inside MPI, and a rank that waits in a mean cannot say
so. This thread can. It sleeps until a signal, the main thread or the clock wakes it, and looks for messages twice a
second. What it does is the matter of its parts, `hpcavg.distributed.preemption` and `hpcavg.distributed.watchdog`.
"""

from __future__ import annotations

import atexit
import os
import select
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from mpi4py import MPI

from hpcavg.distributed.processes import is_running, started_ticks
from hpcavg.distributed.signals import block_during_forks
from hpcavg.distributed.waiting import wait_asleep

_INTERVAL_S = 0.5
_TAG = 1
_NO_SIGNAL = b"\0"  # what wakes the thread without being a signal's number


class Wait(NamedTuple):
    """What the main thread waits for: the `step` it belongs to, the `ranks` that take part, the clock at its start.

    `step` is None where `what` tells it.
    """

    what: object
    step: int | None
    ranks: Sequence[int]
    since: float


class Waiting:
    """Sets `wait` of a supervisor for the time of a block; see `Supervisor.waiting`."""

    __slots__ = ("_outer", "_supervisor", "_wait")

    def __init__(self, supervisor: Supervisor, wait: Wait) -> None:
        self._supervisor = supervisor
        self._wait = wait

    def __enter__(self) -> None:
        self._outer = self._supervisor.wait
        self._supervisor.wait = self._wait

    def __exit__(self, *_: object) -> None:
        self._supervisor.wait = self._outer
        self._supervisor.step_since = time.monotonic()


class Process(NamedTuple):
    """A rank's process; its start, in clock ticks since its host's, tells it from a later one of the same number."""

    host: str
    pid: int
    started_ticks: int

    def is_here(self) -> bool:
        """Return whether it still runs on this host."""
        return self.host == MPI.Get_processor_name() and is_running(self.pid, self.started_ticks) is True


class Part(Protocol):
    """What the thread does. All methods are called by the thread, holding `Supervisor.changed`, and return at once."""

    def receive(self, source: int, *message: Any) -> None:
        """Take a message that the same part of rank `source` has sent."""

    def look(self, now: float) -> float:
        """Do what is due at `now`, of `time.monotonic`; return in how many seconds to call again at the latest."""

    def tell(self) -> Any:
        """Return what survivors need to know of this rank when others have died."""

    def restart(self, told: Sequence[Any]) -> None:
        """Begin anew on a new communicator: forget what was under way; `told` is what its ranks' parts have to say."""


class Supervisor:
    """The thread of one rank, with a duplicate of a communicator that only these threads use. Collective over `comm`.

    After MPI has failed on its communicator, because a rank died, the thread goes quiet: it hears signals, but talks to
    nobody until `move_to` gives it a communicator of the survivors.

    Attributes
    ----------
    rank : rank in the communicator.
    size : size of the communicator.
    processes : the processes of all ranks.
    changed : the condition that guards the thread's state and that of its parts.
    wait : what the main thread waits for; None if it does not wait.
    step : the step that the main thread is taking.
    step_since : since when it does, or since it last waited.
    is_quiet : whether MPI has failed.
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.changed = threading.Condition()
        self.wait: Wait | None = None
        self.step, self.step_since = 0, time.monotonic()
        self.is_quiet = False
        self._parts: dict[str, Part] = {}
        self._on_signal: dict[int, Callable[[int], None]] = {}
        self._former_handlers: dict[int, Any] = {}
        self._former_wakeup_fd: int | None = None
        self._actions: deque[Callable[[], None]] = deque()
        self._is_closed = False
        self._is_rung = False
        self._ear, self._bell = socket.socketpair()
        self._ear.setblocking(False)
        self._bell.setblocking(False)
        self._take(comm)
        self._thread = threading.Thread(target=self._run, name="hpcavg supervisor", daemon=True)
        self._thread.start()
        atexit.register(self.abandon)

    def _take(self, comm: MPI.Intracomm) -> None:
        """Duplicate `comm` and begin anew on it. Collective."""
        own = comm.Dup()
        process = Process(MPI.Get_processor_name(), os.getpid(), started_ticks(os.getpid()))
        with self.changed:
            told = {name: part.tell() for name, part in self._parts.items()}
        processes, told_by_all = zip(*own.allgather((process, told)), strict=True)
        with self.changed:
            self._comm = own
            self.processes: Sequence[Process] = processes
            self.rank: int = own.Get_rank()
            self.size: int = own.Get_size()
            self.is_quiet = False
            self._mail: deque[tuple[int, tuple[Any, ...]]] = deque()
            self._early: list[tuple[int, tuple[Any, ...]]] = []
            self._on_their_way: list[MPI.Request] = []
            self._num_sent = [0] * self.size
            self._num_received = 0
            for name, part in self._parts.items():  # which others may not have made yet
                part.restart([told[name] for told in told_by_all if name in told])

    # -- where the main thread is ---------------------------------------------------------------------------------

    def waiting(self, what: object, step: int | None, ranks: Sequence[int]) -> Waiting:
        """Return a context in which the main thread waits for all of `ranks`, as the other ranks may learn.

        what : a few words, such as ``"global mean"``, or what has them as its text and can be pickled; the same on all
        of `ranks`. step : the step it belongs to; None where `what` tells it.
        """
        return Waiting(self, Wait(what, step, ranks, time.monotonic()))

    def begin_step(self, step: int) -> None:
        """Let the main thread be in `step` from now on."""
        self.step, self.step_since = step, time.monotonic()

    # -- for parts ------------------------------------------------------------------------------------------------

    def add(self, name: str, part: Part) -> None:
        """Let `part` take part, under the same name on all ranks."""
        with self.changed:
            self._parts[name] = part
            self._mail.extend(self._early)
            self._early.clear()
        self.wake()

    def send(self, name: str, rank: int, *message: Any) -> None:
        """Send a small message to the part `name` of `rank`, which may be this one; it is lost where MPI has failed."""
        with self.changed:
            if rank == self.rank:
                self._mail.append((rank, (name, *message)))
            elif not self.is_quiet:
                try:
                    self._on_their_way.append(self._comm.isend((name, *message), rank, _TAG))
                    self._num_sent[rank] += 1
                except MPI.Exception:
                    self._fall_silent()

    def later(self, action: Callable[[], None]) -> None:
        """Let the thread call `action` when it does not hold `changed`: it may take its time."""
        self._actions.append(action)
        self.wake()

    def wake(self) -> None:
        """Let the thread look now."""
        if not self._is_rung:  # the bell has room for some hundred bytes, and a signal that finds it full is lost
            self._is_rung = True
            with suppress(OSError):  # closed
                self._bell.send(_NO_SIGNAL)

    def has_mail(self) -> bool:
        """Return whether a message waits for the thread. Takes about a microsecond."""
        if self.is_quiet or self.size == 1:
            return False
        try:
            return self._comm.Iprobe(MPI.ANY_SOURCE, _TAG)
        except MPI.Exception:
            return True  # the thread will see

    def on_signal(self, number: int, action: Callable[[int], None]) -> None:
        """Let the thread call `action` at signals of this number, wherever the main thread is. Main thread only."""
        if self._former_wakeup_fd is None:
            self._former_wakeup_fd = signal.set_wakeup_fd(self._bell.fileno(), warn_on_full_buffer=False)
            block_during_forks(self._on_signal, self._give_signals_back)
        self._on_signal[number] = action
        self._former_handlers.setdefault(number, signal.signal(number, _ignore))

    # -- the end, and another beginning ---------------------------------------------------------------------------

    def move_to(self, comm: MPI.Intracomm) -> None:
        """Go on with the ranks of `comm`, after others have died. Collective over `comm`.

        Requests and signals that have not been answered are kept. The former communicator is not freed: with ranks
        that are dead, it cannot be.
        """
        self._take(comm)
        self.wake()

    def close(self) -> None:
        """End the threads of all ranks. Collective, and safe to call twice."""
        if self._is_closed:
            return
        wait_asleep(self._comm)  # others may need this rank's thread until they are here, too
        self.abandon()
        # A message that nobody received would be met by whoever gets the communicator's number next.
        num_expected = sum(self._comm.alltoall(self._num_sent))
        while self._num_received < num_expected:
            self._comm.recv(source=MPI.ANY_SOURCE, tag=_TAG)
            self._num_received += 1
        MPI.Request.Waitall(self._on_their_way)
        self._comm.Free()

    def abandon(self) -> None:
        """End this rank's thread and leave its communicator as it is; called at exit."""
        if self._is_closed:
            return
        atexit.unregister(self.abandon)
        self._is_closed = True
        self._give_signals_back()
        self.wake()
        self._thread.join()
        self._ear.close()
        self._bell.close()

    def _give_signals_back(self) -> None:
        """Restore the handlers."""
        if self._former_wakeup_fd is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._former_wakeup_fd)
            self._former_wakeup_fd = None
            for number, handler in self._former_handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._ear, select.POLLIN)
        wait_s = 0.0
        while not self._is_closed:
            poller.poll(1000 * wait_s)
            for number in self._hear():
                if number in self._on_signal:
                    self._on_signal[number](number)
            with self.changed:
                wait_s = self._look()
            while self._actions and not self._is_closed:
                self._actions.popleft()()

    def _hear(self) -> bytes:
        """Return the numbers of the signals that have come, among others."""
        self._is_rung = False  # before the look at what has come, or that is missed which comes between the two
        try:
            return self._ear.recv(4096)
        except BlockingIOError:
            return b""

    def _look(self) -> float:
        """Hand out messages and let the parts do what is due; return how many seconds to sleep."""
        self._receive()
        while self._mail:
            source, (name, *message) = self._mail.popleft()
            if name in self._parts:
                self._parts[name].receive(source, *message)
            else:  # it is being made here, and was made faster there
                self._early.append((source, (name, *message)))
        now = time.monotonic()
        wait_s = min((part.look(now) for part in self._parts.values()), default=_INTERVAL_S)
        return 0.0 if self._mail else max(0.0, min(wait_s, _INTERVAL_S))

    def _receive(self) -> None:
        """Take in what has arrived."""
        if self.is_quiet or self.size == 1:
            return
        try:
            status = MPI.Status()
            while (message := self._comm.improbe(MPI.ANY_SOURCE, _TAG, status)) is not None:
                self._mail.append((status.Get_source(), message.recv()))
                self._num_received += 1
            self._on_their_way = [request for request in self._on_their_way if not request.Test()]
        except MPI.Exception:
            self._fall_silent()

    def _fall_silent(self) -> None:
        """Talk to nobody from now on; nobody may be left waiting for an answer."""
        self.is_quiet = True
        self.changed.notify_all()


def _ignore(*_: object) -> None:
    """A signal's handler in Python, which runs late: the thread has heard of the signal by then."""
