"""The supervisor: one thread per rank that receives signals, answers other ranks, and knows what the main thread does.

A Python signal handler does not run while the main thread is inside MPI, and a rank that waits in a mean cannot answer
messages. This thread can. It sleeps until a signal, the main thread or the clock wakes it, and polls for messages twice
a second. Its parts do the work: `hpcavg.distributed.preemption` and `hpcavg.distributed.watchdog`.
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

_POLL_S = 0.5
_TAG = 1
_NO_SIGNAL = b"\0"  # wakes the thread and is not the number of a signal


class Wait(NamedTuple):
    """A wait of the main thread for other ranks.

    Attributes
    ----------
    what : its name, as text or as a picklable object with that text.
    step : the training step; None if `what` contains it.
    ranks : the ranks that take part.
    since : start of the wait, as `time.monotonic`.
    """

    what: object
    step: int | None
    ranks: Sequence[int]
    since: float


class Waiting:
    """A context that sets `Supervisor.wait`; see `Supervisor.waiting`."""

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
    """The process of a rank.

    Attributes
    ----------
    host : name of its host.
    pid : its number.
    started_ticks : its start, in clock ticks since the host started. A later process may have the same number, but not
        the same start.
    """

    host: str
    pid: int
    started_ticks: int

    def is_here(self) -> bool:
        """Return whether the process runs on this host."""
        return self.host == MPI.Get_processor_name() and is_running(self.pid, self.started_ticks) is True


class Part(Protocol):
    """One task of the thread. The thread calls all methods, holds `Supervisor.changed`, and expects a quick return."""

    def receive(self, source: int, *message: Any) -> None:
        """Handle a message from the same part of rank `source`."""

    def poll(self, now: float) -> float:
        """Do what is due at `now`, as `time.monotonic`. Return the seconds until the next call at the latest."""

    def recovery_state(self) -> Any:
        """Return what the survivors need from this rank after a death."""

    def restart(self, states: Sequence[Any]) -> None:
        """Restart on a new communicator, without unfinished work. `states` has the `recovery_state` of every rank."""


class Supervisor:
    """The supervising thread of one rank. Collective over `comm`.

    If a rank dies, MPI fails on the communicator, and the thread goes quiet: it still receives signals, but sends and
    receives no messages until `move_to` gives it a communicator of the survivors.

    Parameters
    ----------
    comm : the ranks. The threads use a duplicate of it.

    Attributes
    ----------
    rank : rank in the communicator.
    size : size of the communicator.
    processes : the processes of all ranks.
    changed : the condition that guards the state of the thread and of its parts.
    wait : the current wait of the main thread; None if it does not wait.
    step : the current step of the main thread.
    step_since : start of this step, or end of the last wait if that is later, as `time.monotonic`.
    is_quiet : whether MPI has failed.

    Examples
    --------
    >>> supervisor = Supervisor(MPI.COMM_SELF)
    >>> with supervisor.waiting("global mean", step=3, ranks=[0]):
    ...     supervisor.wait.what
    'global mean'
    >>> supervisor.close()
    """

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.changed = threading.Condition()
        self.wait: Wait | None = None
        self.step, self.step_since = 0, time.monotonic()
        self.is_quiet = False
        self._parts: dict[str, Part] = {}
        self._on_signal: dict[int, Callable[[int], None]] = {}
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup_fd: int | None = None
        self._actions: deque[Callable[[], None]] = deque()
        self._is_closed = False
        self._is_woken = False
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._start_on(comm)
        self._thread = threading.Thread(target=self._run, name="hpcavg supervisor", daemon=True)
        self._thread.start()
        atexit.register(self.abandon)

    def _start_on(self, comm: MPI.Intracomm) -> None:
        """Duplicate `comm` and start, or restart, on the duplicate. Collective over `comm`."""
        own = comm.Dup()
        process = Process(MPI.Get_processor_name(), os.getpid(), started_ticks(os.getpid()))
        with self.changed:
            own_states = {name: part.recovery_state() for name, part in self._parts.items()}
        processes, all_states = zip(*own.allgather((process, own_states)), strict=True)
        with self.changed:
            self._comm = own
            self.processes: Sequence[Process] = processes
            self.rank: int = own.Get_rank()
            self.size: int = own.Get_size()
            self.is_quiet = False
            self._messages: deque[tuple[int, tuple[Any, ...]]] = deque()
            self._early_messages: list[tuple[int, tuple[Any, ...]]] = []
            self._sends: list[MPI.Request] = []
            self._num_sent = [0] * self.size
            self._num_received = 0
            for name, part in self._parts.items():  # other ranks may not have added this part yet
                part.restart([states[name] for states in all_states if name in states])

    # -- state of the main thread ---------------------------------------------------------------------------------

    def waiting(self, what: object, step: int | None, ranks: Sequence[int]) -> Waiting:
        """Return a context in which the main thread waits for all of `ranks`; watchdog reports contain the wait.

        Parameters
        ----------
        what : its name, such as ``"global mean"``, as text or as a picklable object with that text; the same on all of
            `ranks`.
        step : the training step; None if `what` contains it.
        ranks : the ranks that take part.
        """
        return Waiting(self, Wait(what, step, ranks, time.monotonic()))

    def begin_step(self, step: int) -> None:
        """Set the current step of the main thread."""
        self.step, self.step_since = step, time.monotonic()

    # -- called by parts ------------------------------------------------------------------------------------------

    def add(self, name: str, part: Part) -> None:
        """Add `part`, under the same name on all ranks."""
        with self.changed:
            self._parts[name] = part
            self._messages.extend(self._early_messages)
            self._early_messages.clear()
        self.wake()

    def send(self, name: str, rank: int, *message: Any) -> None:
        """Send a small message to a part of another rank, or of this rank. The message is lost if MPI has failed.

        Parameters
        ----------
        name : name of the part.
        rank : the receiver.
        *message : picklable values.
        """
        with self.changed:
            if rank == self.rank:
                self._messages.append((rank, (name, *message)))
            elif not self.is_quiet:
                try:
                    self._sends.append(self._comm.isend((name, *message), rank, _TAG))
                    self._num_sent[rank] += 1
                except MPI.Exception:
                    self._go_quiet()

    def later(self, action: Callable[[], None]) -> None:
        """Let the thread call `action` without holding `changed`. The action may take long."""
        self._actions.append(action)
        self.wake()

    def wake(self) -> None:
        """Wake the thread."""
        if not self._is_woken:  # the socket holds some hundred bytes, and a signal is lost if it is full
            self._is_woken = True
            with suppress(OSError):  # closed
                self._wake_sender.send(_NO_SIGNAL)

    def has_message(self) -> bool:
        """Return whether a message has arrived for the thread. Takes about a microsecond."""
        if self.is_quiet or self.size == 1:
            return False
        try:
            return self._comm.Iprobe(MPI.ANY_SOURCE, _TAG)
        except MPI.Exception:
            return True  # the thread will find the error

    def on_signal(self, number: int, action: Callable[[int], None]) -> None:
        """Let the thread call ``action(number)`` at every such signal, whatever the main thread does.

        Call this on the main thread.
        """
        if self._old_wakeup_fd is None:
            self._old_wakeup_fd = signal.set_wakeup_fd(self._wake_sender.fileno(), warn_on_full_buffer=False)
            block_during_forks(self._on_signal, self._restore_handlers)
        self._on_signal[number] = action
        self._old_handlers.setdefault(number, signal.signal(number, _ignore))

    # -- recovery and end -----------------------------------------------------------------------------------------

    def move_to(self, comm: MPI.Intracomm) -> None:
        """Continue with the ranks of `comm` after a death. Collective over `comm`.

        Open requests and signals are kept. The old communicator is not freed: dead ranks make this impossible.
        """
        self._start_on(comm)
        self.wake()

    def close(self) -> None:
        """End the threads of all ranks. Collective over all ranks. May be called twice."""
        if self._is_closed:
            return
        wait_asleep(self._comm)  # until then, other ranks may need this thread
        self.abandon()
        # The next communicator with the same number would receive messages that are left.
        num_expected = sum(self._comm.alltoall(self._num_sent))
        while self._num_received < num_expected:
            self._comm.recv(source=MPI.ANY_SOURCE, tag=_TAG)
            self._num_received += 1
        MPI.Request.Waitall(self._sends)
        self._comm.Free()

    def abandon(self) -> None:
        """End this rank's thread and leave its communicator as it is. Called at exit."""
        if self._is_closed:
            return
        atexit.unregister(self.abandon)
        self._is_closed = True
        self._restore_handlers()
        self.wake()
        self._thread.join()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _restore_handlers(self) -> None:
        """Restore the signal handlers from before `on_signal`."""
        if self._old_wakeup_fd is not None and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._old_wakeup_fd)
            self._old_wakeup_fd = None
            for number, handler in self._old_handlers.items():
                signal.signal(number, handler or signal.SIG_DFL)

    # -- the thread -----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._wake_receiver, select.POLLIN)
        wait_s = 0.0
        while not self._is_closed:
            poller.poll(1000 * wait_s)
            for number in self._read_signals():
                if number in self._on_signal:
                    self._on_signal[number](number)
            with self.changed:
                wait_s = self._poll()
            while self._actions and not self._is_closed:
                self._actions.popleft()()

    def _read_signals(self) -> bytes:
        """Return the numbers of the signals that have arrived, and zeros."""
        self._is_woken = False  # before the read: a call of wake() in between must not be lost
        try:
            return self._wake_receiver.recv(4096)
        except BlockingIOError:
            return b""

    def _poll(self) -> float:
        """Deliver messages and let the parts do what is due. Return the seconds to sleep."""
        self._receive()
        while self._messages:
            source, (name, *message) = self._messages.popleft()
            if name in self._parts:
                self._parts[name].receive(source, *message)
            else:  # the other rank added this part earlier than this rank
                self._early_messages.append((source, (name, *message)))
        now = time.monotonic()
        wait_s = min((part.poll(now) for part in self._parts.values()), default=_POLL_S)
        return 0.0 if self._messages else max(0.0, min(wait_s, _POLL_S))

    def _receive(self) -> None:
        """Receive all messages that have arrived."""
        if self.is_quiet or self.size == 1:
            return
        try:
            status = MPI.Status()
            while (message := self._comm.improbe(MPI.ANY_SOURCE, _TAG, status)) is not None:
                self._messages.append((status.Get_source(), message.recv()))
                self._num_received += 1
            self._sends = [request for request in self._sends if not request.Test()]
        except MPI.Exception:
            self._go_quiet()

    def _go_quiet(self) -> None:
        """Stop all messages after MPI has failed, and wake the main thread if it waits for one."""
        self.is_quiet = True
        self.changed.notify_all()


def _ignore(*_: object) -> None:
    """Handle a signal in Python: nothing to do, since the thread has received the signal before."""
