"""Checkpoints: a folder of a run's states, each either whole or absent; and the file of the final model.

Rank 0 calls `create`, every rank `write_rank` for each of its learners, then rank 0 `commit` and `prune`. This module
does not use MPI: the caller synchronizes the ranks between these calls. A failure of the disk is an `OSError`;
`discard` then removes the unfinished checkpoint. No earlier checkpoint is touched before a later one is whole.
"""

from __future__ import annotations

import errno
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hpcavg.checkpoints import tensor_file
from hpcavg.checkpoints.manifest import MANIFEST, Manifest, rank_file
from hpcavg.errors import InputError, why
from hpcavg.utils import files
from hpcavg.utils.files import FileRecord
from hpcavg.utils.format_version import NewerFormatError

_T = TypeVar("_T")

LATEST = "latest"
NOT_FINISHED = f"it has no {MANIFEST}: it was not finished"
NO_FOLDER = "there is no such folder"
_MARK = re.compile(r"unfinished-(\d{1,7})")
_FOLDER = re.compile(r"step-(\d{8,})(?:~(\d+))?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has a manifest."""

    path: Path
    manifest: Manifest

    def fault(self, first: int = 0, stride: int = 1) -> str | None:
        """Read files and return what is wrong, in a few words; None if nothing is.

        Parameters
        ----------
        first : int
            The first file to read.
        stride : int
            Read every `stride`-th file from there on. N ranks share the work with ``fault(rank, N)``.
        """
        return next(
            filter(None, (files.fault(self.path, record) for record in self.manifest.files[first::stride])), None
        )

    def load(self, rank: int, parts: Collection[str] | None = None) -> dict[str, Any]:
        """Return a learner's parts by name, from whichever files hold them. Checksums are not compared; see `fault`.

        Parameters
        ----------
        rank : int
            Whose parts: the learner's number.
        parts : collection of str
            Which of them; all by default.

        Raises
        ------
        InputError
            If a file cannot be read.
        """
        places = {part: place for part, place in self.manifest.parts[rank].items() if parts is None or part in parts}
        found: dict[str, Any] = {}
        for place in sorted(set(places.values())):
            held = [part for part in places if places[part] == place]
            found |= tensor_file.read(self.path / rank_file(place), "resume", held)
        return {part: found[part] for part in places}

    def understand(self, use: Callable[[Checkpoint], _T]) -> _T:
        """Return ``use(self)``. Every exception but `OSError` becomes an `InputError`.

        A checkpoint may be whole to the last byte and still lack what `use` needs: another program, or another
        version, may have written it.
        """
        try:
            return use(self)
        except (InputError, OSError):
            raise
        except Exception as error:
            if isinstance(error, KeyError):
                lacks = f"it has no {error}"
            else:
                lacks = f"{error}" if isinstance(error, NewerFormatError) else f"{type(error).__name__}: {error}"
            raise InputError("resume", self.path, f"a checkpoint that this hpcavg can go on from ({lacks})") from error


# -- writing ------------------------------------------------------------------------------------------------------


def create(folder: Path, step: int, num_ranks: int) -> Path:
    """Make and return a new folder for a checkpoint of `num_ranks` at `step`, beside any other of the same step.

    An empty file in it, `_mark`, says until the manifest exists that hpcavg made the folder and may remove it.
    """
    while True:
        path = _free_path(folder, _step_name(step))
        with suppress(FileExistsError):
            files.make_folder(path)
            break
    try:
        files.write_file(path / _mark(num_ranks), [])
    except OSError:
        discard(path)
        raise
    return path


def _mark(num_ranks: int) -> str:
    """Return the name of the file that marks an unfinished checkpoint of `num_ranks`."""
    return f"unfinished-{num_ranks}"


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def _free_path(folder: Path, name: str) -> Path:
    """Return the first free path in `folder` of `name`, `name`~2, `name`~3 and so on."""
    names = chain([name], (f"{name}~{attempt}" for attempt in count(2)))
    return next(folder / name for name in names if not os.path.lexists(folder / name))


def write_rank(path: Path, rank: int, parts: Mapping[str, Any]) -> FileRecord:
    """Write the parts, trees as in `tensor_file`, that the file of the learner `rank` holds; `path` is the folder."""
    return files.write_file(path / rank_file(rank), tensor_file.chunks(dict(parts)))


def commit(path: Path, manifest: Manifest) -> None:
    """Make the checkpoint in `path` count, once every rank's file is written; then let ``latest`` point to it."""
    _free_latest(path.parent)
    numbers = (found.manifest.number for _, found in _entries(path.parent) if isinstance(found, Checkpoint))
    manifest = replace(manifest, number=1 + max(numbers, default=0))
    files.replace_file(path / MANIFEST, [manifest.to_json().encode()])
    files.switch_link(path.parent / LATEST, path.name)
    with suppress(OSError):
        files.perform(os.unlink, path / _mark(manifest.num_ranks))


def _free_latest(folder: Path) -> None:
    """Rename what has the name ``latest`` and is no link; nothing is removed.

    A copy of a run that follows links turns the link into a folder. Such a copy of a checkpoint gets a checkpoint's
    name, beside the original.
    """
    path = folder / LATEST
    if os.path.lexists(path) and not path.is_symlink():
        found = _inspect(path, verify=False)
        name = _step_name(found.manifest.step) if isinstance(found, Checkpoint) else LATEST
        files.perform(os.rename, path, _free_path(folder, name))


def discard(path: Path) -> None:
    """Remove a checkpoint that could not be written, as far as possible. A finished one is left alone."""
    with suppress(OSError):
        if _latest(path.parent) != path.name:
            _remove(path)


def prune(folder: Path, keep: int) -> list[str]:
    """Remove all but the newest `keep` checkpoints, and those that are half written or half removed.

    Nothing is removed if no checkpoint is whole. These stay: the checkpoint that ``latest`` points to, whatever hpcavg
    did not write, damaged checkpoints, and those of a newer format. A link is removed, and not what it points to.

    Parameters
    ----------
    folder : Path
        Where the checkpoints are.
    keep : int
        At least 1.

    Returns
    -------
    list of str
        Why something could not be removed, a line each. The next call tries again.
    """
    try:
        latest = _latest(folder)
        entries = _entries(folder)
    except OSError as error:
        return [why(error)]
    whole = [path for path, found in entries if isinstance(found, Checkpoint)]
    half = [path for path, found in entries if whole and found == NOT_FINISHED and not path.is_symlink()]
    remains: list[str] = []
    for path in (*half, *whole[keep:]):
        if path.name != latest:
            try:
                _remove(path)
            except OSError as error:
                remains.append(why(error))
    return remains


def _remove(path: Path) -> None:
    """Remove the files of a checkpoint, and its folder unless something else is in it. Of a link, remove the link.

    First the manifest becomes the mark of an unfinished checkpoint, which still says of how many ranks it is.
    """
    if path.is_symlink():
        files.perform(os.unlink, path)
    else:
        found = _inspect(path, verify=False)
        marks = _marks(path)
        if isinstance(found, Checkpoint):
            mark = path / _mark(found.manifest.num_ranks)
            if os.path.lexists(mark) and mark.name not in marks:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(mark))
            files.perform(os.rename, path / MANIFEST, mark)
            files.sync_folder(path)
            marks[mark.name] = found.manifest.num_ranks
        ranks = range(max(marks.values(), default=0))
        partial = [f"{MANIFEST}.partial"] if marks else []
        files.remove_files(path, [*map(rank_file, ranks), *partial, *marks])
    files.sync_folder(path.parent)


def _marks(path: Path) -> dict[str, int]:
    """Return the marks in `path` that `create` or `_remove` made, each with its number of ranks."""
    found: dict[str, int] = {}
    with os.scandir(path) as entries:
        for entry in entries:
            match = _MARK.fullmatch(entry.name)
            if match and entry.is_file(follow_symlinks=False):
                data = files.read_small(entry.path)
                with suppress(Exception):  # somebody's file of this name
                    if not data or Manifest.from_json(data).num_ranks == int(match[1]):
                        found[entry.name] = int(match[1])
    return found


# -- finding ------------------------------------------------------------------------------------------------------


def candidates(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`: first those that are not whole, then the others, the newest first.

    Raises `InputError` if `folder` cannot be read. One that does not exist is empty.
    """
    try:
        return [path for path, _ in _entries(folder)]
    except OSError as error:
        raise InputError("resume", folder, f"a folder that can be read ({error.strerror})") from error


def newest(folder: Path) -> tuple[Checkpoint | None, list[tuple[Path, str]]]:
    """Return the newest good checkpoint, and those that were passed over, each with the reason.

    Every byte of it is read. Raises `InputError` if `folder` cannot be read.
    """
    passed_over: list[tuple[Path, str]] = []
    for path in candidates(folder):
        found = _inspect(path, verify=True)
        if isinstance(found, Checkpoint):
            return found, passed_over
        passed_over.append((path, found))
    return None, passed_over


def open_checkpoint(path: Path | str, verify: bool = True) -> Checkpoint:
    """Return the checkpoint in a folder.

    Parameters
    ----------
    path : Path or str
        The folder, or a link to it such as ``latest``.
    verify : bool
        Whether to read every byte, and not only the manifest.

    Raises
    ------
    InputError
        If the checkpoint is not whole, or is damaged.
    """
    found = _inspect(Path(os.path.realpath(path)) if os.path.islink(path) else Path(path), verify)
    if isinstance(found, Checkpoint):
        return found
    raise InputError("resume", path, f"a whole checkpoint ({found})")


def _entries(folder: Path) -> list[tuple[Path, Checkpoint | str]]:
    """Return the checkpoints in `folder`, in the order of `candidates`, each with the result of `_inspect`."""
    entries = []
    with suppress(FileNotFoundError):
        for name in os.listdir(folder):
            match = _FOLDER.fullmatch(name)
            if match:
                found = _inspect(folder / name, verify=False)
                number = found.manifest.number if isinstance(found, Checkpoint) else math.inf
                entries.append(((number, int(match[1]), int(match[2] or 1)), folder / name, found))
    return [(path, found) for _, path, found in sorted(entries, key=lambda entry: entry[0], reverse=True)]


def _inspect(path: Path, verify: bool) -> Checkpoint | str:
    """Return the checkpoint in `path`, or why it is not good. With `verify` all its files are read."""
    try:
        with files.open_file(path / MANIFEST) as file:
            found = Checkpoint(path, Manifest.from_json(file.read()))
        return (verify and found.fault()) or found
    except FileNotFoundError:
        return NOT_FINISHED if os.path.isdir(path) else NO_FOLDER
    except NotADirectoryError:
        return NO_FOLDER
    except OSError as error:
        return f"{MANIFEST}: {error.strerror}"
    except NewerFormatError as error:
        return str(error)
    except Exception:  # damaged JSON, or JSON of another shape, raises many kinds
        return f"{MANIFEST} is damaged"


def _latest(folder: Path) -> str | None:
    """Return the name that ``latest`` points to."""
    try:
        return os.readlink(folder / LATEST)
    except OSError:
        return None


# -- the final model ----------------------------------------------------------------------------------------------


def save_model(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state_dict to `path`, whole or not at all; its SHA-256 is `tensor_file.digest` of it."""
    files.replace_file(path, tensor_file.chunks(dict(state)))


def load_model(path: Path | str) -> dict[str, Tensor]:
    """Return the state_dict that `save_model` wrote, for ``model.load_state_dict``; raises `InputError`."""
    return tensor_file.read(path, "path")
