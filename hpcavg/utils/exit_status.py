"""The exit statuses of ``python -m hpcavg``: each is defined here, once. The docs' table is made from them."""

from __future__ import annotations

import signal
from enum import IntEnum

from hpcavg.utils import markdown


class ExitStatus(IntEnum):
    """How a command ended.

    Attributes
    ----------
    meaning : str
        What the status says, for the docs.
    action : str
        What to do about it, for the docs.
    """

    meaning: str
    action: str

    def __new__(cls, value: int, meaning: str, action: str = "") -> ExitStatus:
        """Return the member of this value."""
        status = int.__new__(cls, value)
        status._value_, status.meaning, status.action = value, meaning, action
        return status

    DONE = 0, "done"
    FAILED = (
        1,
        "a rank failed: its traceback names the rank, and the job was ended; or a run was asked to stop and could not"
        " write a checkpoint of that, or keeps none (downpour, eamsgd); or the text of `info`, `report`, `job` or"
        " `--help` could not be written",
        "read the error",
    )
    BAD_INPUT = (
        2,
        "the input cannot be used: one line names the option, the value and what is allowed; nothing was written",
        "correct it",
    )
    RECORDS_LOST = (
        3,
        "done, but records were lost, on a full disk for example: the last lines say which",
        "see the disk",
    )
    REQUEUE = (
        75,  # EX_TEMPFAIL of sysexits.h
        "stopped early, by a signal or a time limit, with a checkpoint of this stop; or a rank failed with"
        " `--on-failure restart`",
        "start the same command again, with `--resume auto`",
    )
    INTERRUPTED = (
        128 + signal.SIGINT,
        "interrupted from the keyboard: a run that was starting, or `data`",
        "start the same command again",
    )
    READER_LEFT = (  # as the shell gives it for a program that SIGPIPE ends
        128 + signal.SIGPIPE,
        "the reader of the text of `info`, `report`, `job` or `--help` left before its end (`... | head -1`)",
    )


def markdown_table() -> str:
    """Return the table of all statuses for the docs."""
    rows = [(str(int(status)), status.meaning, status.action) for status in ExitStatus]
    rows.append(
        ("above 128", "a rank was killed by the signal of number (status - 128)", "start the same command again")
    )
    return markdown.table(("status", "meaning", "what to do"), rows)
