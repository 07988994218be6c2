"""A run's folder: what it was configured with, where it ran, and how it ended."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import tomli_w
from mpi4py import MPI

import hpcavg
from hpcavg import files
from hpcavg.config import CHECKPOINTS, CONFIG_FILE, Config
from hpcavg.errors import InputError, why

FINAL_MODEL = Path(CHECKPOINTS, "final.safetensors")


def create(config: Config, task_name: str) -> Path:
    """Make the folder with its ``metrics`` and ``checkpoints``, or find it where a run is resumed, and return it.

    Raises `InputError` when it cannot be written or holds another run.
    """
    algorithm = config.algorithm.replace("_", "-")
    label = re.sub(r"[^A-Za-z0-9_.-]+", "-", task_name)
    path = Path(config.output or f"runs/{label}-{algorithm}-{time.strftime('%Y%m%d-%H%M%S')}")
    attempt = 1
    while config.output is None and path.exists():  # two runs started within a second
        attempt += 1
        path = path.with_name(f"{path.name.partition('~')[0]}~{attempt}")
    check(path, may_be_run=config.resume is not None)
    try:
        (path / "metrics").mkdir(parents=True, exist_ok=True)
        (path / CHECKPOINTS).mkdir(exist_ok=True)
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error
    return path


def check(path: Path, may_be_run: bool = False) -> None:
    """Raise `InputError` when `path` cannot become a run's folder, or with `may_be_run` be one; nothing is written.

    A run that was killed before it could write its configuration counts as one.
    """
    try:
        begun = {"metrics", CHECKPOINTS, f"{CONFIG_FILE}.partial"}
        names = {entry.name for entry in path.iterdir()} if path.is_dir() else set()
        if names and not (may_be_run and ((path / CONFIG_FILE).is_file() or names <= begun)):
            raise InputError("output", path, "a new or empty folder; this one holds files, as another run would")
        parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    except OSError as error:
        raise _unwritable(path, str(error.strerror)) from error
    if not parent.is_dir():
        raise _unwritable(path, f"{parent} is a file")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise _unwritable(path, f"{parent}: permission denied")


def _unwritable(path: Path, reason: str) -> InputError:
    return InputError("output", path, f"a folder that can be written ({reason})")


@contextmanager
def starting(path: Path) -> Iterator[None]:
    """Raise `InputError` where the folder cannot be written inside the block: better than training without a record.

    A folder that holds nothing else yet is removed.
    """
    try:
        yield
    except OSError as error:
        for folder in (path / "metrics", path / CHECKPOINTS, path):
            with suppress(OSError):
                folder.rmdir()
        raise _unwritable(path, why(error)) from error


def write_start(path: Path, config: Config, nodes: list[str], threads: int, device: str) -> None:
    """Write ``config.toml``, which can be fed back as --config, and ``environment.json``."""
    options = {name: value for name, value in config.as_toml().items() if name not in ("output", "resume")}
    files.replace_file(path / CONFIG_FILE, [tomli_w.dumps(options).encode()])
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
    write_json(path / "environment.json", environment)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write `values` to `path` as JSON, whole or not at all; NaN and infinity, unknown to JSON, become null."""
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in values.items()
    }
    files.replace_file(path, [(json.dumps(values, indent=2) + "\n").encode()])


def attempt(write: Callable[[], object]) -> str | None:
    """Call `write`, whose failure must not end the run; return why it failed, in one line, or None.

    Only OSError counts as such a failure, with the name of the file where it has one.
    """
    try:
        write()
    except OSError as error:
        return why(error)
    return None


@functools.cache
def git_revision() -> str | None:
    """Return the revision of the checkout that hpcavg runs from, with a plus sign where it was changed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
