"""Signals to a rank: those that arrive before training starts, second signals, and forks. Without MPI."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable

_REQUESTS = (signal.SIGUSR1, signal.SIGTERM)
_SAME_SIGNAL_S = 1.0
_early_signals: list[signal.Signals] = []
_first_signal_s: list[float] = []


def remember_early_signals() -> None:
    """Keep SIGUSR1 and SIGTERM from now on; `early_signals` returns them.

    A second SIGTERM, a second or more after the first, ends the process at once.
    """
    own_pid = os.getpid()

    def remember(number: int, frame: object) -> None:
        # A forked child may inherit this handler, if another one was set and removed before the fork.
        if os.getpid() != own_pid or (number == signal.SIGTERM and is_second_signal(_first_signal_s)):
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        else:
            _early_signals.append(signal.Signals(number))

    def restore_defaults() -> None:
        for number in _REQUESTS:
            signal.signal(number, signal.SIG_DFL)

    for number in _REQUESTS:
        signal.signal(number, remember)
    block_during_forks(_REQUESTS, restore_defaults)


def early_signals() -> list[signal.Signals]:
    """Return the signals that arrived while the program was starting."""
    return list(_early_signals)


def block_during_forks(numbers: Iterable[int], set_child_handlers: Callable[[], None]) -> None:
    """Block signals during every fork from now on.

    Otherwise a child would lose a signal that arrives before it has its own handlers.

    Parameters
    ----------
    numbers : the signals; read at every fork.
    set_child_handlers : called in the child while the signals are still blocked.
    """

    def unblock() -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)

    def begin_child() -> None:
        set_child_handlers()
        unblock()

    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, numbers),
        after_in_parent=unblock,
        after_in_child=begin_child,
    )


def is_second_signal(first_signal_s: list[float]) -> bool:
    """Return whether a SIGTERM or SIGINT that arrives now is a second one.

    Launcher and scheduler may both forward one signal. Signals within a second of the first count as the same.

    Parameters
    ----------
    first_signal_s : time of the first signal, as `time.monotonic`; empty before it. This function fills it.
    """
    now = time.monotonic()
    first_signal_s[:] = first_signal_s or [now]
    return now - first_signal_s[0] > _SAME_SIGNAL_S
