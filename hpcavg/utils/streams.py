"""Standard output and error of the command line: a full disk or a reader that leaves must not end a training."""

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
    """A descriptor that takes all that is written to it; what it could not pass on is lost.

    is_closed : the descriptor stands for one that the program was started without. warns : the first loss is told on
    standard error at once. error : of the first loss, None while there is none.
    """

    def __init__(self, descriptor: int, is_closed: bool, warns: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error = OSError(errno.EBADF, os.strerror(errno.EBADF)) if is_closed else None
        self.has_lost, self._warns = False, warns and not is_closed

    def write(self, data: Any) -> int:
        try:
            while (written := super().write(data)) is None:  # somebody made it non-blocking
                select.select([], [self], [])
        except OSError as error:
            self.error = self.error or error
            self.has_lost, written = True, memoryview(data).nbytes
            if self._warns and error.errno != errno.EPIPE:
                self._warns = False
                tell(f"hpcavg: warning: {self.why}; what it would show is lost")
        else:
            self.has_lost = self.has_lost or self.error is not None
        return written

    @property
    def why(self) -> str:
        """What is wrong with it, in a few words."""
        return f"standard output cannot be written ({self.error.strerror if self.error else 'for no known reason'})"


_out: _Stream | None = None


def guard(goes_on: bool) -> None:
    """Let nothing of this program fail from now on because it writes to standard output or error.

    goes_on : it is run for something else than what it prints; a loss is told when it happens.
    """
    global _out
    # Or files that are opened later would get these numbers, and what libraries print.
    closed = [number for number in range(3) if _open_if_closed(number)]
    if sys.stdout is sys.__stdout__:
        _out = _Stream(1, 1 in closed, goes_on)
        sys.stdout = sys.__stdout__ = _text(_out, sys.stdout)  # type: ignore[assignment,misc]
    if sys.stderr is sys.__stderr__:
        sys.stderr = sys.__stderr__ = _text(_Stream(2, 2 in closed, False), sys.stderr)  # type: ignore[assignment,misc]


def flush() -> None:
    """Pass on what is still held back, where that is possible."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # full, closed, None
            stream.flush()


def tell(text: str) -> None:
    """Write lines to standard error at once, where that is possible: what comes after must come in any case.

    To the process's own: torch.distributed puts a buffer in its place, which the end of a job would lose.
    """
    with suppress(OSError, ValueError, AttributeError):
        stderr = sys.__stderr__ or sys.stderr
        stderr.write(f"{text.rstrip()}\n")
        stderr.flush()


def settle(status: int, goes_on: bool) -> int:
    """Return the exit status of a program that would end with `status`: another where what it was run for is lost."""
    flush()
    if goes_on or status or _out is None or not _out.has_lost:
        return status
    if _out.error is not None and _out.error.errno == errno.EPIPE:
        return ExitStatus.READER_LEFT
    tell(f"hpcavg: error: {_out.why}")
    return ExitStatus.FAILED


def _open_if_closed(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
        return True
    return False


def _text(stream: _Stream, before: TextIO | None) -> TextIO:
    """Return a text stream like `before`, None for one that was closed, that also takes what its encoding lacks."""
    old: Any = before
    encoding = old.encoding if old else "utf-8"
    errors = old.errors if old else "strict"
    if errors == "strict":
        errors = "surrogateescape" if encoding.lower() in ("utf-8", "utf8") else "backslashreplace"
    return io.TextIOWrapper(
        io.BufferedWriter(stream),
        encoding,
        errors,
        line_buffering=bool(old and (old.line_buffering or old.write_through)),  # the latter: python -u
    )
