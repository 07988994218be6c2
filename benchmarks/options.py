"""Shared by the command lines of all benchmarks. Imports neither torch nor MPI."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hpcavg.distributed.job_environment import launcher_rank
from hpcavg.errors import InputError


class Parser(argparse.ArgumentParser):
    """The options of a benchmark. Every rank parses them; only rank 0 prints help and errors."""

    def __init__(self, text: str | None) -> None:
        super().__init__(
            prog=f"python -m benchmarks.{Path(sys.argv[0]).stem}",
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def _print_message(self, message: str, file: Any = None) -> None:
        if launcher_rank() == 0:
            super()._print_message(message, file)

    def error(self, message: str) -> NoReturn:
        """Print `message` and end with status 2."""
        self.exit(2, f"error: {message}\n")


def run(main: Callable[[], int | None]) -> None:
    """Run a benchmark and exit with the status that it returns, if any.

    An `InputError`, which all ranks raise, becomes one line and exit status 2.
    """
    try:
        status = main()
    except InputError as error:
        if launcher_rank() == 0:
            print(f"error: {error.as_option()}", file=sys.stderr, flush=True)
        status = 2
    if status:
        sys.exit(status)


def chosen(option: str, only: Sequence[str] | None, names: Iterable[str]) -> list[str]:
    """Return the `names` that are in `only`, or all if it is None; raise `InputError` of `option` for unknown ones."""
    names = list(names)
    for name in only or ():
        if name not in names:
            raise InputError(option, name, f"one of {', '.join(names)}")
    return [name for name in names if only is None or name in only]
