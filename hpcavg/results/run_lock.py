"""The lock on a run's folder: if several jobs are given the same folder, one trains and the others are refused.

The lock works on network file systems: it uses neither file locks nor the clock of another host. It is a file in the
folder, ``lock-000001``, which names its owner. `RunLock.take` waits until every lock in the folder is found dead. It
makes a lock with the next number, which only one process can (O_EXCL), and looks again. If there is a lock by then that
it has not found dead, it removes its own and starts over. Otherwise it has the folder, and removes the dead locks.

An owner on the same machine is dead if its process has ended. An owner elsewhere touches its file every `BEAT_S`
seconds; it is dead if nothing has touched the file for `SILENT_S`, by the clock of the process that waits. An owner
that was only suspended for so long finds its file gone when it continues.
"""

from __future__ import annotations

import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from hpcavg.distributed.job_environment import scheduler_job
from hpcavg.distributed.processes import is_running, started_ticks
from hpcavg.errors import InputError, why
from hpcavg.utils import files
from hpcavg.utils.streams import print_error

BEAT_S = 10.0
SILENT_S = 60.0
# Seconds after which a process that waits says so.
_TELL_S = 2.0
# For so long a running owner may be about to end: a job may be started again as soon as its launcher has ended.
_ENDING_S = 3.0
# Seconds between looks at a lock, and before a second look for one's own lock that was not found.
_LOOK_S = 0.5
_AGAIN_S = 1.0
_NAME = re.compile(r"lock-\d{6,}", re.ASCII)


@dataclass(frozen=True)
class Owner:
    """The owner of a lock.

    Parameters
    ----------
    run : str
        Identifies the run.
    host : str
        Its host's name, for people.
    pid : int
        Its process.
    started_ticks : int
        When the process started; with `pid` and `machine`, identifies the process.
    machine : str
        Identifies the machine since its last boot; empty if that is unknown.
    job : str or None
        Its job, for people.
    has_heirs : bool
        Whether the run may go on without this process.
    """

    run: str
    host: str
    pid: int
    started_ticks: int
    machine: str
    job: str | None
    has_heirs: bool

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}{f' ({self.job})' if self.job else ''}"

    def __post_init__(self) -> None:
        numbers = type(self.pid) is type(self.started_ticks) is int and 0 < self.pid < 2**31
        if not (numbers and all(isinstance(text, str) for text in (self.run, self.host, self.machine))):
            raise ValueError("not an owner")

    def to_bytes(self) -> bytes:
        """Return what the lock's file holds."""
        return (json.dumps(asdict(self)) + "\n").encode()

    @staticmethod
    def of(text: bytes) -> Owner | None:
        """Return the owner that a lock's `text` names; None if it is damaged, or no lock."""
        with suppress(Exception):
            return Owner(**json.loads(text))
        return None

    def is_running(self) -> bool | None:
        """Return whether the process still runs; None if this process cannot know."""
        return is_running(self.pid, self.started_ticks) if self.machine and self.machine == _machine() else None


def this_process(run: str, has_heirs: bool = False) -> Owner:
    """Return this process as the owner of a lock."""
    pid = os.getpid()
    return Owner(run, platform.node(), pid, started_ticks(pid), _machine(), scheduler_job(os.environ), has_heirs)


def _machine() -> str:
    """Return an identifier of this machine since its last boot, and of the process ids that this process can see."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_lock(name: str) -> bool:
    """Return whether a file of this name may be a lock."""
    return _NAME.fullmatch(name) is not None


def owners(folder: Path) -> list[Owner]:
    """Return the owners of the locks in `folder`, dead or alive, the latest first."""
    with suppress(OSError):
        found = map(Owner.of, _scan(folder)[0].values())
        return [owner for owner in found if owner is not None][::-1]
    return []


class RunLock:
    """A run's lock on its folder. One rank of the run holds it.

    Parameters
    ----------
    owner : Owner
        This process.
    on_lost : callable
        Called with one line if another run has taken the folder over; by a thread, or by `beat`.
    """

    def __init__(self, owner: Owner, on_lost: Callable[[str], None]) -> None:
        self._owner = owner
        self._text = owner.to_bytes()
        self._on_lost = on_lost
        self._guard = threading.RLock()
        self._folder: Path | None = None
        self._file: Path | None = None
        self._is_missed = False
        self._is_over = threading.Event()

    @property
    def is_held(self) -> bool:
        """Whether this process has the lock."""
        return self._file is not None

    def __enter__(self) -> None:
        """Release the lock if the block fails, unless the run may go on without this process."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, InputError) or (error is not None and not self._owner.has_heirs):
            self.release()

    def take(self, folder: Path) -> None:
        """Take the lock on `folder` and hold it until `release`. Does nothing if this process holds it already.

        It may have to wait until it knows whether an owner is dead, and says so.

        Raises
        ------
        InputError
            If another run uses the folder, or the folder cannot be written. The folder is unchanged then.
        """
        if self.is_held:
            return
        try:
            while self._file is None:
                locks, free = _scan(folder)
                dead = {path: text for path in locks if (text := _wait_for_death(path)) is not None}
                self._file = self._claim(free, dead)
        except OSError as error:
            raise InputError("output", folder, f"a folder that can be written ({why(error)})") from error
        self._begin(folder)

    def inherit(self, folder: Path) -> None:
        """Take the lock on `folder` over from a rank of the same run that has died."""
        if self._folder is None:
            self._begin(folder)

    def beat(self) -> None:
        """Touch the lock, or find out that another run has taken the folder over."""
        with self._guard:
            if self._folder is None:
                return
            with suppress(OSError):  # the recorders report a folder that is gone or cannot be read
                if self._file is None:
                    self._succeed(self._folder)
                elif _text(self._file) == self._text:
                    self._is_missed = False
                    os.utime(self._file)
                else:
                    self._miss(self._folder)

    def release(self) -> None:
        """Release the folder. Does nothing if the lock is not held."""
        self._is_over.set()
        with self._guard:
            file, self._file, self._folder = self._file, None, None
            with suppress(OSError):
                if file is not None and _text(file) == self._text:
                    _remove(file)

    # -- helpers --------------------------------------------------------------------------------------------------

    def _claim(self, path: Path, dead: Mapping[Path, bytes]) -> Path | None:
        """Make the lock `path` and return it; return None if there is a lock by now that is not among the `dead`."""
        if not self._make(path):
            return None
        try:
            others = {other: text for other, text in _scan(path.parent)[0].items() if other != path}
            is_mine = all(dead.get(other) == text for other, text in others.items())
            for other, text in others.items():
                if is_mine and (Owner.of(text) or not text.strip(b"\0")):  # other files may be somebody's own
                    _remove(other)
        except OSError:
            with suppress(OSError):
                _remove(path)
            raise
        if not is_mine:
            _remove(path)
        return path if is_mine else None

    def _make(self, path: Path) -> bool:
        """Make the file `path`; return False if another process was faster."""
        try:
            files.write_file(path, [self._text])
        except FileExistsError:
            return False
        except OSError:
            with suppress(OSError):
                _remove(path)
            raise
        return True

    def _succeed(self, folder: Path) -> None:
        """Take over the lock of the same run. No other process does; the dead rank may have released it."""
        locks, free = _scan(folder)
        before = [path for path, text in locks.items() if (owner := Owner.of(text)) and owner.run == self._owner.run]
        if locks and not before:
            self._miss(folder)
        elif self._make(free):
            self._file = free
            for path in before:
                _remove(path)

    def _miss(self, folder: Path) -> None:
        """Report that the lock is gone: at once if another run has the folder, otherwise at the second look."""
        os.stat(folder)
        others = [owner for owner in owners(folder) if owner.run != self._owner.run]
        if others or self._is_missed:
            by = others[0] if others else "somebody who removed its lock"
            self._on_lost(f"--output {folder}: taken over by {by}, when this run had not moved for a while; it ends")
        self._is_missed = True

    def _begin(self, folder: Path) -> None:
        self._folder = folder
        self._is_over = threading.Event()
        threading.Thread(target=self._run_heart, args=(self._is_over,), name="hpcavg lock", daemon=True).start()

    def _run_heart(self, is_over: threading.Event) -> None:
        self.beat()
        while not is_over.wait(_AGAIN_S if self._is_missed else BEAT_S):
            self.beat()


def _scan(folder: Path) -> tuple[dict[Path, bytes], Path]:
    """Return the locks in `folder` with their text, and the path of the next one. Links and folders are no locks."""
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if is_lock(entry.name)), key=lambda entry: int(entry.name[5:]))
    paths = [folder / entry.name for entry in found if entry.is_file(follow_symlinks=False)]
    locks = {path: text for path in paths if (text := _text(path)) is not None}
    return locks, folder / f"lock-{int(found[-1].name[5:]) + 1 if found else 1:06d}"


def _remove(path: Path) -> None:
    with suppress(FileNotFoundError):
        files.perform(os.unlink, path)


def _text(path: Path) -> bytes | None:
    """Return the text of a lock; None if it is gone."""
    with suppress(FileNotFoundError):
        return files.read_small(path)
    return None


def _wait_for_death(path: Path) -> bytes | None:
    """Return the text of the lock `path` once its owner is dead; None if the lock is gone.

    Raises `InputError` if the owner is alive.
    """
    began, has_told, first = time.monotonic(), False, None
    while True:
        try:
            with files.open_file(path) as file:  # opening makes NFS ask the server, for the time of change, too
                seen = (os.fstat(file.fileno()).st_mtime_ns, file.read(files.SMALL_BYTES))
        except FileNotFoundError:
            return None
        first = first or seen
        owner = Owner.of(seen[1])
        runs = owner.is_running() if owner else None
        waited_s = time.monotonic() - began
        if seen != first or (runs and waited_s > _ENDING_S):
            raise _in_use(path, owner)
        if not runs and ((owner and runs is False and not owner.has_heirs) or waited_s > SILENT_S):
            return seen[1]
        if waited_s > _TELL_S and not runs and not has_told:
            has_told = True
            _tell(path, owner)
        time.sleep(min(_LOOK_S, SILENT_S / 8))


def _in_use(path: Path, owner: Owner | None) -> InputError:
    who = owner or f"a process that {path.name} does not name"
    return InputError("output", path.parent, f"a folder that no other run uses; {who} does")


def _tell(path: Path, owner: Owner | None) -> None:
    whose = f"of {owner}" if owner else "damaged"
    print_error(f"hpcavg: {path} is {whose}; waiting {SILENT_S:.0f} s for a sign that its run goes on")
