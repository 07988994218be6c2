"""Ending the job when a rank fails: the other ranks would wait for it for ever."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mpi4py import MPI

from hpcavg.distributed import child_processes
from hpcavg.utils import streams


def install_abort_hook(status: int = 1) -> None:
    """Make an uncaught exception, on any rank, print its traceback once and end the whole job; see `on_uncaught`.

    One rank alone keeps nobody waiting, so that its own exceptions are left to Python, unless the job is to end with
    another status than Python's.
    """
    child_processes.require_rank()
    world = MPI.COMM_WORLD
    text = f"rank {world.Get_rank()} failed; the job is ended"
    on_uncaught(text, lambda: world.Abort(status), is_alone=world.Get_size() == 1 and status == 1)


def on_uncaught(text: str, end: Callable[[], None], is_alone: bool = False) -> None:
    """Make an uncaught exception print `text` and its traceback, and then call `end`.

    That is one of the main thread, of the thread that calls this, in which the training is, or of hpcavg's own, which
    have names that begin with "hpcavg": others wait for these. What any other thread raises is printed with the rank,
    and what a user raises at a prompt is printed. Where a rank `is_alone`, only hpcavg's own threads end it.
    """
    rank, training = MPI.COMM_WORLD.Get_rank(), threading.current_thread()

    def say(title: str, error: tuple[Any, Any, Any]) -> None:
        streams.flush()
        streams.print_error(f"hpcavg: {title}\n{''.join(traceback.format_exception(*error))}")

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_alone or hasattr(sys, "ps1"):
            sys.__excepthook__(kind, error, trace)
        else:
            say(text, (kind, error, trace))
            end()

    def tell_from_thread(args: Any) -> None:
        if args.exc_type is SystemExit:
            return
        error = args.exc_type, args.exc_value, args.exc_traceback
        name = args.thread.name if args.thread else "without a name"
        if name.startswith("hpcavg") or (args.thread is training and not is_alone):
            say(text, error)
            end()
        elif is_alone:
            threading.__excepthook__(args)
        else:
            say(f"rank {rank} goes on; its thread {name} failed", error)

    sys.excepthook = tell
    threading.excepthook = tell_from_thread
