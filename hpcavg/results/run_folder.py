"""A run's folder: made, locked and checked; its configuration and environment."""

from __future__ import annotations

import errno
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from itertools import count
from pathlib import Path

import tomli_w
from mpi4py import MPI

import hpcavg
from hpcavg.config import sources
from hpcavg.config.options import CHECKPOINTS, CONFIG_FILE, Config
from hpcavg.errors import InputError, why
from hpcavg.results.run_lock import RunLock, is_lock, owners
from hpcavg.utils import files
from hpcavg.utils.revision import git_revision

FINAL_MODEL = Path(CHECKPOINTS, "final.safetensors")


@contextmanager
def creating(config: Config, task_name: str, lock: RunLock) -> Iterator[Path]:
    """Make the run's folder with ``metrics`` and ``checkpoints``, or take the one that is resumed; yield its path.

    The folder is locked from then on. On an error, also inside the block, new folders are removed.

    Parameters
    ----------
    config : Config
        Its ``output`` and ``resume``.
    task_name : str
        For the folder's name, if ``output`` is unset.
    lock : RunLock
        Of this run.

    Raises
    ------
    InputError
        If the folder cannot be written, holds another run, or is in use by one.
    """
    algorithm = config.method.label
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", task_name)
    path = Path(config.run.output or f"runs/{label}-{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    may_be_run = config.checkpoints.resume is not None
    if config.run.output is not None:
        check(path, may_be_run)
    made: list[Path] = []
    try:
        path = _make_folders(path, made, may_rename=config.run.output is None)
        lock.take(path)
        check(path, may_be_run)  # again: another may have come and gone
        for part in (path / "metrics", path / CHECKPOINTS):
            if not part.exists():
                part.mkdir()
                made.append(part)
        yield path
    except (OSError, InputError) as error:
        lock.release()
        for folder in reversed(made):
            with suppress(OSError):
                folder.rmdir()
        raise error if isinstance(error, InputError) else _unwritable(path, why(error)) from error


def _make_folders(path: Path, made: list[Path], may_rename: bool) -> Path:
    """Make the folder `path` and return it; append every new folder to `made`.

    If the folder exists and `may_rename`, make one of a similar name: another run was started in the same second.
    """
    for parent in reversed(path.parents):
        if not parent.exists():
            parent.mkdir(exist_ok=True)
            made.append(parent)
    for attempt in count(1):
        folder = path if attempt == 1 else path.with_name(f"{path.name}~{attempt}")
        try:
            folder.mkdir()
        except FileExistsError:
            if may_rename:
                continue
        else:
            made.append(folder)
        return folder
    raise AssertionError


def check(path: Path, may_be_run: bool = False) -> None:
    """Raise `InputError` if `path` cannot become a run's folder. Nothing is written.

    Parameters
    ----------
    path : Path
        The folder.
    may_be_run : bool
        Whether it may hold a run already. A run that was killed before it wrote its configuration counts.
    """
    try:
        begun = {"metrics", CHECKPOINTS, f"{CONFIG_FILE}.partial"}
        names = {entry.name for entry in path.iterdir() if not is_lock(entry.name)} if path.is_dir() else set()
        if names and not (may_be_run and ((path / CONFIG_FILE).is_file() or names <= begun)):
            by = "".join(f" (that of {owner})" for owner in owners(path)[:1])
            raise InputError("output", path, f"a new or empty folder; this one holds files, as another run would{by}")
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error
    if not parent.is_dir():
        raise _unwritable(path, f"{parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        is_read_only = os.statvfs(parent).f_flag & os.ST_RDONLY
        raise _unwritable(path, f"{parent}: {os.strerror(errno.EROFS) if is_read_only else 'permission denied'}")


def _unwritable(path: Path, reason: str) -> InputError:
    return InputError("output", path, f"a folder that can be written ({reason})")


def write_start(path: Path, config: Config, nodes: list[str], threads: int, device: str) -> None:
    """Write ``config.toml``, which ``--config`` takes, and ``environment.json``."""
    options = {name: value for name, value in config.as_toml().items() if name not in ("output", "resume")}
    files.replace_file(path / CONFIG_FILE, [tomli_w.dumps({"format": sources.FORMAT, **options}).encode()])
    environment = {
        "hpcavg": hpcavg.__version__,
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "numpy", "h5py", "mpi4py")},
        "mpi_library": MPI.Get_library_version().strip("\0\n "),
        "platform": platform.platform(),
        "nodes": nodes,
        "threads_per_rank": threads,
        "device": device,
        "git_revision": git_revision(),
        "command": sys.argv,
    }
    files.write_json(path / "environment.json", environment)


def attempt(write: Callable[[], object]) -> str | None:
    """Call `write`, whose `OSError` must not end the run. Return the error in one line, or None."""
    try:
        write()
    except OSError as error:
        return why(error)
    return None
