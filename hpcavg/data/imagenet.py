"""ImageNet-1K on disk: from class folders of JPEG files to shards that ranks can map.

Importing this module imports neither torch nor Pillow.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from hpcavg.data import class_folders, shards
from hpcavg.data.class_folders import BadImageError, File
from hpcavg.data.gratings import synthesize as synthesize
from hpcavg.errors import InputError, reason, require_integer
from hpcavg.utils.files import fault, replace_file
from hpcavg.utils.progress import Display, display

IMAGES_PER_SHARD, MAX_SHARDS = 2048, 512
"""Every mapped shard takes a file descriptor; a rank can keep this many mapped."""
MIN_SIZE, MAX_SIZE = 16, 4096
_SHUFFLE_SEED = 2012

if TYPE_CHECKING:  # the import would start MPI, which only the caller may do
    from mpi4py import MPI

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Shard:
    """A shard to write.

    Attributes
    ----------
    part : ``train`` or ``val``.
    number : its number in the part.
    files : its images in order.
    """

    part: str
    number: int
    files: list[File]


@dataclass(frozen=True)
class _Plan:
    """What is to be done, known to rank 0.

    Attributes
    ----------
    settings : what the shards depend on.
    num_shards : by part.
    missing : the shards to write.
    is_done : the folder is finished already.
    """

    settings: dict[str, Any]
    num_shards: dict[str, int]
    missing: list[_Shard]
    is_done: bool


def prepare(source: Path, destination: Path, size: int, comm: MPI.Comm) -> None:
    """Decode class folders of JPEG files into shards. Collective: the ranks of `comm` share the work.

    The shards are the same for any number of ranks. Whole shards are kept, so an interrupted call can be continued and
    a finished folder stays as it is. Damaged images are left out and reported at the end.

    Parameters
    ----------
    source : Path
        The folder with ``train`` and ``val``.
    destination : Path
        The folder for the shards: new, empty, or of an earlier call.
    size : int
        The length of an image's shorter side in pixels, after scaling.
    comm : MPI.Comm
        The ranks that share the work.

    Raises
    ------
    InputError
        A folder cannot be used. All ranks raise it.
    """
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    plan = _together(comm, lambda: _plan(source, destination, size) if rank == 0 else None)
    # A rank gets the names of its own files: those of all of ImageNet take hundreds of megabytes.
    own = comm.scatter(None if plan is None else [plan.missing[i::num_ranks] for i in range(num_ranks)], root=0)
    _together(comm, lambda: _write_shards(own, source, destination, size, comm))
    _together(comm, lambda: None if plan is None else _finish(plan, destination))


def check(data_dir: str, comm: MPI.Comm) -> None:
    """Read every file of a prepared folder and print a line for each damaged one. Collective.

    A shard is damaged if its SHA-256 differs from the one at the time of writing.

    Parameters
    ----------
    data_dir : str
        The folder, or its parent if it is called ``prepared``.
    comm : MPI.Comm
        The ranks that share the work.

    Raises
    ------
    InputError
        A file is damaged. All ranks raise it.
    """
    rank, num_ranks = comm.Get_rank(), comm.Get_size()
    folder = _together(comm, lambda: shards.find(data_dir))
    meta = _together(comm, lambda: shards.read_meta(folder))
    records = [record for part in shards.PARTS for record in meta.shards[part]]
    own = records[rank::num_ranks]
    found = [_index_fault(folder, meta, part) for part in shards.PARTS] if rank == 0 else []
    shown, on_every = _display(comm, len(own), "shards")
    for done, record in enumerate(own, 1):
        found.append(fault(folder, record))
        shown.advance()
        shown.line(f"{done} of {len(own)} shards read{on_every}")
    shown.close()
    damaged = sorted(filter(None, itertools.chain(*comm.allgather(found))))
    if rank == 0:
        for line in [f"{folder}/{says}" for says in damaged] or [f"{folder}: every file is whole"]:
            print(line, flush=True)
    if damaged:
        allowed = f"whole; {len(damaged)} of its {len(records) + len(shards.PARTS)} files are damaged: remove them and"
        raise InputError("data_dir", folder, f"{allowed} start `python -m hpcavg data prepare imagenet` again")


def _index_fault(folder: Path, meta: shards.Meta, part: str) -> str | None:
    try:
        shards.check_index(folder / shards.index_name(part), meta, part)
    except InputError as error:
        return f"{shards.index_name(part)} must be {error.allowed}"
    return None


def _display(comm: MPI.Comm, total: int, what: str) -> tuple[Display, str]:
    """Return the display of this rank's share of the work, `total` of `what`, and the end of its lines."""
    of_rank, on_every = (" of rank 0", " on every rank") if comm.Get_size() > 1 else ("", "")
    return display(comm.Get_rank(), total, what=f"{what}{of_rank}"), on_every


def _together(comm: MPI.Comm, action: Callable[[], _T]) -> _T:
    """Run `action` and return its result. An `InputError` on any rank is raised on all. Collective."""
    result, error = None, None
    try:
        result = action()
    except InputError as raised:
        error = raised
    for first in comm.allgather(error):
        if first is not None:
            raise first
    return result  # type: ignore[return-value]  # it is set unless there is an error


# -- the plan -----------------------------------------------------------------------------------------------------


def _plan(source: Path, destination: Path, size: int) -> _Plan:
    """Return what is to be done. `destination` then exists and holds the settings."""
    require_integer("size", size, MIN_SIZE, MAX_SIZE)
    classes, found = class_folders.find(source)
    parts = {part: _shuffled(files) for part, files in found.items()}
    per_shard = {part: max(IMAGES_PER_SHARD, -(-len(files) // MAX_SHARDS)) for part, files in parts.items()}
    settings = {
        "size": size,
        "classes": classes,
        "files": {part: len(files) for part, files in parts.items()},
        "images_per_shard": per_shard,
        "order": {part: _digest(files) for part, files in parts.items()},
    }
    is_finished = _claim(destination, settings)
    wanted = [
        _Shard(part, number, files[start : start + per_shard[part]])
        for part, files in parts.items()
        for number, start in enumerate(range(0, len(files), per_shard[part]))
    ]
    missing = [shard for shard in wanted if _read_account(destination, shard.part, shard.number) is None]
    needed, free = sum(len(shard.files) for shard in missing) * size**2 * 3, _free_bytes(destination)
    if needed > free:
        allowed = f"a folder with room for at least {needed / 1e6:,.0f} MB more; {free / 1e6:,.0f} MB are free"
        raise InputError("output", destination, allowed)
    num_shards = {part: sum(shard.part == part for shard in wanted) for part in parts}
    return _Plan(settings, num_shards, missing, is_finished and not missing and _is_whole(destination))


def _shuffled(files: list[File]) -> list[File]:
    """Return the files in a random order, always the same, so that every shard has images of all classes."""
    return [files[i] for i in np.random.default_rng(_SHUFFLE_SEED).permutation(len(files))]


def _digest(files: list[File]) -> str:
    return hashlib.sha256(b"\n".join(os.fsencode(file.path) for file in files)).hexdigest()


def _claim(destination: Path, settings: dict[str, Any]) -> bool:
    """Write the settings into a new folder, or compare them with an old one's; return whether it is finished."""
    meta = destination / shards.META
    try:
        destination.mkdir(parents=True, exist_ok=True)
        if not meta.exists():
            if any(not entry.name.endswith(".partial") for entry in destination.iterdir()):
                raise InputError("output", destination, "a new or empty folder, or one of an earlier `data prepare`")
            _write_json(meta, _meta(settings))
            return False
    except OSError as error:
        raise InputError("output", destination, f"a folder that can be written: {reason(error)}") from error
    found = shards.read_json(meta)
    for name, value in settings.items():
        other = found.get("settings", {}).get(name)
        if other != value:
            says = f"{name} {other}, not {value}" if name == "size" else f"other {name.replace('_', ' ')}"
            raise InputError("output", destination, f"another folder: this one was begun with {says}")
    return "parts" in found


def _is_whole(destination: Path) -> bool:
    try:
        shards.check(destination)
    except InputError:
        return False
    return True


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _meta(settings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"format": shards.FORMAT, "version": shards.VERSION, "settings": settings, **more}


# -- shards -------------------------------------------------------------------------------------------------------


def _write_shards(own: list[_Shard], source: Path, destination: Path, size: int, comm: MPI.Comm) -> None:
    shown, on_every = _display(comm, sum(len(shard.files) for shard in own), "images")
    try:
        for done, shard in enumerate(own, 1):
            _write_shard(shard, source, destination, size, shown)
            shown.line(f"{done} of {len(own)} shards written{on_every}")
    except OSError as error:
        raise InputError("output", destination, f"a folder that can be written: {reason(error)}") from error
    finally:
        shown.close()


def _write_shard(shard: _Shard, source: Path, destination: Path, size: int, shown: Display) -> None:
    """Write one shard, and then its account: a JSON file with its contents, which tells that the shard is whole."""
    rows: list[tuple[int, ...]] = []
    skipped: list[dict[str, str]] = []

    def chunks() -> Iterator[bytes]:
        yield shards.MAGIC
        offset = len(shards.MAGIC)
        for file in shard.files:
            try:
                height, width, pixels = class_folders.decode(source / file.path, size)
            except BadImageError as error:
                skipped.append({"path": file.path, "reason": str(error)})
            else:
                rows.append((shard.number, offset, height, width, file.label))
                offset += len(pixels)
                yield pixels
            shown.advance()

    record = replace_file(destination / shards.shard_name(shard.part, shard.number), chunks())
    account = {"shard": asdict(record)}
    _write_json(_account_path(destination, shard.part, shard.number), {**account, "rows": rows, "skipped": skipped})


def _account_path(destination: Path, part: str, number: int) -> Path:
    return (destination / shards.shard_name(part, number)).with_suffix(".json")


def _read_account(destination: Path, part: str, number: int) -> dict[str, Any] | None:
    """Return a finished shard's account; None if there is none or the shard has another size."""
    try:
        account = json.loads(_account_path(destination, part, number).read_bytes())
        num_bytes = (destination / account["shard"]["name"]).stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return account if num_bytes == account["shard"]["num_bytes"] else None


def _write_json(path: Path, values: dict[str, Any]) -> None:
    replace_file(path, [json.dumps(values, indent=1).encode()])


# -- the end ------------------------------------------------------------------------------------------------------


def _finish(plan: _Plan, destination: Path) -> None:
    """Write the indices and then ``meta.json``, which finishes the folder; print what was done."""
    if plan.is_done:
        print(f"{destination} holds these images already", flush=True)
        return
    parts: dict[str, Any] = {}
    try:
        for part, num_shards in plan.num_shards.items():
            accounts = [_read_account(destination, part, number) for number in range(num_shards)]
            whole = [account for account in accounts if account is not None]
            if len(whole) != num_shards:
                raise InputError("output", destination, "a folder that nothing else writes to; a shard is gone")
            parts[part] = _write_index(destination, part, whole)
        _write_json(destination / shards.META, _meta(plan.settings, parts=parts))
    except OSError as error:
        raise InputError("output", destination, f"a folder that can be written: {reason(error)}") from error
    shards.check(destination)
    print(_summary(plan, parts, destination), flush=True)


def _write_index(destination: Path, part: str, accounts: list[dict[str, Any]]) -> dict[str, Any]:
    rows = np.array([tuple(row) for account in accounts for row in account["rows"]], shards.ROW)
    skipped = [skip for account in accounts for skip in account["skipped"]]
    if not len(rows):
        why = f"{skipped[0]['path']}: {skipped[0]['reason']}"
        raise InputError("data_dir", part, f"a part with at least one whole image; all are damaged, such as {why}")
    file = BytesIO()
    np.save(file, rows)
    replace_file(destination / shards.index_name(part), [file.getvalue()])
    return {"images": len(rows), "shards": [account["shard"] for account in accounts], "skipped": skipped}


def _summary(plan: _Plan, parts: dict[str, Any], destination: Path) -> str:
    num_bytes = sum(shard["num_bytes"] for part in parts.values() for shard in part["shards"])
    skipped = [skip for part in parts.values() for skip in part["skipped"]]
    named = ", ".join(f"{skip['path']} ({skip['reason']})" for skip in skipped[:3])
    more = f" and others, all in {shards.META}" if len(skipped) > 3 else ""
    left_out = f"; left out {len(skipped)} damaged: {named}{more}" if skipped else ""
    return (
        f"{parts['train']['images']:,} training and {parts['val']['images']:,} validation images of"
        f" {len(plan.settings['classes']):,} classes, {num_bytes / 1e9:.3g} GB, in {destination}{left_out}"
    )
