"""Standard output and error of the command line. A full disk or a closed pipe must not end a training."""

from __future__ import annotations

import errno
import io
import os
import select
import sys
from contextlib import suppress
from typing import Any, TextIO

from hpcavg.utils.exit_status import ExitStatus


class _Stream(io.FileIO):
    """A file descriptor for which no write fails: data that cannot be written are lost.

    Parameters
    ----------
    descriptor : int
        The file descriptor.
    is_closed : bool
        The program was started without this descriptor.
    warns : bool
        Report the first loss on standard error at once.

    Attributes
    ----------
    error : the error of the first loss; None if nothing is lost.
    has_lost : data are lost.
    """

    def __init__(self, descriptor: int, is_closed: bool, warns: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error = OSError(errno.EBADF, os.strerror(errno.EBADF)) if is_closed else None
        self.has_lost, self._warns = False, warns and not is_closed

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # another program made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.error = self.error or error
            self.has_lost, written = True, memoryview(data).nbytes
            if self._warns and error.errno != errno.EPIPE:
                self._warns = False
                print_error(f"hpcavg: warning: {self.why}; what it would show is lost")
        else:
            self.has_lost = self.has_lost or self.error is not None
        return written

    @property
    def why(self) -> str:
        """Why it cannot be written, in a few words."""
        return f"standard output cannot be written ({self.error.strerror if self.error else 'for no known reason'})"


_out: _Stream | None = None


def guard(only_prints: bool) -> None:
    """From now on, let no write to standard output or error fail.

    Parameters
    ----------
    only_prints : bool
        The program is run only for its output. Other programs report the first loss and go on.
    """
    global _out
    # Otherwise files opened later would get these numbers, and receive what libraries print.
    closed = [number for number in range(3) if _open_if_closed(number)]
    if sys.stdout is sys.__stdout__:
        _out = _Stream(1, 1 in closed, not only_prints)
        sys.stdout = sys.__stdout__ = _text(_out, sys.stdout)  # type: ignore[assignment,misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _text(_Stream(2, 2 in closed, False), sys.stderr)  # type: ignore[assignment,misc]


def flush() -> None:
    """Write buffered output, if that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, closed, None
            stream.flush()


def print_error(text: str) -> None:
    """Write `text` to standard error at once, if that is possible.

    ``sys.__stderr__`` comes first: torch.distributed replaces ``sys.stderr`` by a buffer, which an abort would lose.
    """
    with suppress(OSError, ValueError, AttributeError):
        stderr = sys.__stderr__ or sys.stderr
        stderr.write(f"{text.rstrip()}\n")
        stderr.flush()


def final_status(status: int, only_prints: bool) -> int:
    """Return the exit status of a program: `status`, or a failure if the output that it was run for is lost."""
    flush()
    if not only_prints or status or _out is None or not _out.has_lost:
        return status
    if _out.error is not None and _out.error.errno == errno.EPIPE:
        return ExitStatus.READER_LEFT
    print_error(f"hpcavg: error: {_out.why}")
    return ExitStatus.FAILED


def _open_if_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        return True
    return False


def _text(stream: _Stream, before: TextIO | None) -> TextIO:
    """Return a text stream like `before` (None if it was closed) that also takes characters its encoding lacks."""
    old: Any = before
    encoding = old.encoding if old else "utf-8"
    errors = old.errors if old else "strict"
    if errors == "strict":
        errors = "surrogateescape" if encoding.lower() in ("utf-8", "utf8") else "backslashreplace"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding,
        errors,
        line_buffering=bool(old and (old.line_buffering or old.write_through)),  # write_through: python -u
    )
