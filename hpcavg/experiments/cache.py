"""The results of finished runs, in a folder: a file for each, by the run's key. And who carries out which run.

Several ranks, and several jobs, may use the same folder. Who carries out a run holds a lock on a file of it
(``flock``), so the lock of a process that is killed is free at once.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hpcavg.errors import reason
from hpcavg.experiments.run import Result, Run
from hpcavg.utils import files
from hpcavg.utils.streams import print_error

_LOCK = ".lock"


@dataclass(frozen=True)
class Claim:
    """The right to carry out a run. It ends with the process, or when it is released.

    Attributes
    ----------
    run : the run.
    """

    run: Run
    _path: Path
    _descriptor: int

    def release(self) -> None:
        """Remove what the run has left, and let others have it."""
        _clear(self._path, self._descriptor)


class Cache:
    """Keeps the results of runs.

    Parameters
    ----------
    folder : where the results are. It is made if it is missing.

    Raises
    ------
    OSError
        If the folder cannot be made, or its file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._under_way = folder / "under-way"
        self._under_way.mkdir(parents=True, exist_ok=True)
        probe = _lock(self._under_way / f"probe-{os.getpid()}{_LOCK}")
        if probe is not None:
            _clear(self._under_way / f"probe-{os.getpid()}{_LOCK}", probe)

    def get(self, run: Run) -> Result | None:
        """Return the result of a run; None if there is none. A damaged file counts as none."""
        path = self._path(run)
        try:
            content = json.loads(path.read_bytes())
            if content["key"] != run.key or not isinstance(content["result"], dict):
                raise ValueError("it is of another run")
            return content["result"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError) as error:
            print_error(f"hpcavg: warning: {path} is damaged ({reason(error)}); its run is carried out again")
            path.unlink(missing_ok=True)
            return None

    def put(self, run: Run, result: Result, seconds: float) -> None:
        """Keep the result of a run, and how long it took. It is on the disk when this returns."""
        about = {"key": run.key, "function": run.function, "options": run.options, "seconds": seconds}
        files.replace_file(self._path(run), [json.dumps({**about, "result": result}).encode()])

    def missing(self, runs: Iterable[Run]) -> list[Run]:
        """Return those of `runs` that have no result, each once."""
        by_key = {run.key: run for run in runs}
        return [run for run in by_key.values() if self.get(run) is None]

    def has(self, run: Run) -> bool:
        """Return whether a run has a file, without reading it."""
        return self._path(run).is_file()

    def claim(self, run: Run) -> Claim | None:
        """Return the right to carry out a run; None if somebody has it, or if the run has a result."""
        path = self._under_way / f"{run.key}{_LOCK}"
        descriptor = _lock(path)
        if descriptor is None:
            return None
        claim = Claim(run, path, descriptor)
        if self.has(run):
            claim.release()
            return None
        shutil.rmtree(self.folder_of(run), ignore_errors=True)  # of a process that was killed
        return claim

    def folder_of(self, run: Run) -> Path:
        """Return the folder for what a run writes while it is under way."""
        return self._under_way / run.key

    def remove_remains(self) -> None:
        """Remove what killed processes have left. Runs under way are left alone."""
        for path in self._under_way.glob(f"*{_LOCK}"):
            if (descriptor := _lock(path)) is not None:
                _clear(path, descriptor)

    def _path(self, run: Run) -> Path:
        return self.folder / f"{run.key}.json"


def _lock(path: Path) -> int | None:
    """Make and lock a file; return its descriptor, or None if another has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        with suppress(BlockingIOError, FileNotFoundError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever had the lock may have removed the file meanwhile, and a third one may have made a new one.
            if os.path.samestat(os.stat(path), os.fstat(descriptor)):
                return descriptor
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _clear(path: Path, descriptor: int) -> None:
    """Remove a locked file and the folder of its run, then unlock it."""
    shutil.rmtree(path.with_suffix(""), ignore_errors=True)
    path.unlink(missing_ok=True)
    os.close(descriptor)
