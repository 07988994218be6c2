"""Ends the job when a rank fails: the other ranks would wait for it forever."""

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
    """Make an uncaught exception on any rank print its traceback once and end the whole job; see `on_uncaught`.

    If there is one rank, no other rank waits for it, and Python handles its exceptions, unless `status` is not 1.

    Parameters
    ----------
    status : the exit status of the job.

    Raises
    ------
    RuntimeError
        In a child process of a rank.
    """
    child_processes.require_rank()
    world = MPI.COMM_WORLD
    text = f"rank {world.Get_rank()} failed; the job is ended"
    on_uncaught(text, lambda: world.Abort(status), is_alone=world.Get_size() == 1 and status == 1)


def on_uncaught(text: str, end: Callable[[], None], is_alone: bool = False) -> None:
    """Make an uncaught exception print `text` and its traceback, and then call `end`.

    This holds for the threads that other ranks wait for: the main thread, the training thread (it calls this
    function), and the threads whose names start with "hpcavg". Exceptions of other threads, and exceptions at a
    prompt, are only printed.

    Parameters
    ----------
    text : first line of the report.
    end : ends the rank or the job.
    is_alone : there is one rank. Only the threads whose names start with "hpcavg" call `end`.
    """
    rank, training_thread = MPI.COMM_WORLD.Get_rank(), threading.current_thread()

    def print_traceback(title: str, error: tuple[Any, Any, Any]) -> None:
        streams.flush()
        streams.print_error(f"hpcavg: {title}\n{''.join(traceback.format_exception(*error))}")

    def on_main_thread(error_type: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if is_alone or hasattr(sys, "ps1"):  # a prompt
            sys.__excepthook__(error_type, error, trace)
        else:
            print_traceback(text, (error_type, error, trace))
            end()

    def on_other_thread(args: Any) -> None:
        if args.exc_type is SystemExit:
            return
        error = args.exc_type, args.exc_value, args.exc_traceback
        name = args.thread.name if args.thread else "without a name"
        if name.startswith("hpcavg") or (args.thread is training_thread and not is_alone):
            print_traceback(text, error)
            end()
        elif is_alone:
            threading.__excepthook__(args)
        else:
            print_traceback(f"rank {rank} goes on; its thread {name} failed", error)

    sys.excepthook = on_main_thread
    threading.excepthook = on_other_thread
