"""A checkpoint of all learners, written together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hpcavg.checkpoints import store, tensor_file
from hpcavg.checkpoints.store import Manifest
from hpcavg.distributed.topology import Topology
from hpcavg.errors import why


class Saved(NamedTuple):
    """A checkpoint's folder, why it could not be written, None where it was, and why older ones could not be removed.

    One that was not written counts for nothing, and earlier ones are as they were.
    """

    path: Path
    error: str | None
    remains: Sequence[str] = ()


def save(
    topology: Topology,
    folder: Path,
    keep: int,
    step: int,
    parts: Mapping[str, Any],
    about: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a checkpoint of all learners and say how that went. Collective over them.

    What several learners hold alike is written once. keep : checkpoints to leave, the older ones are removed. parts :
    this learner's state, by name. about : rank 0's values for the manifest. guard : called by rank 0 before it changes
    the folder; does not return where it must not.
    """
    world = topology.world
    digests = world.allgather({name: tensor_file.digest(part) for name, part in parts.items()})
    places = [
        {name: next(rank for rank, other in enumerate(digests) if other[name] == value) for name, value in own.items()}
        for own in digests
    ]
    path, error = folder, None
    if world.Get_rank() == 0:
        guard()
        try:
            path = store.create(folder, step, world.Get_size())
        except OSError as raised:
            error = why(raised)
    path, error = world.bcast((path, error))
    if error is not None:
        return Saved(path, error)
    rank = world.Get_rank()
    record = None
    try:
        record = store.write_rank(path, rank, {name: parts[name] for name, at in places[rank].items() if at == rank})
    except OSError as raised:
        error = why(raised)
    records, errors = zip(*world.allgather((record, error)), strict=True)
    error = next(filter(None, errors), None)
    remains: list[str] = []
    if rank == 0:
        guard()
        try:
            if error is None:
                store.commit(path, Manifest(step, world.Get_size(), list(records), places, dict(about)))
        except OSError as raised:
            error = why(raised)
        guard()
        if error is None:
            remains = store.prune(folder, keep)
        else:
            store.discard(path)
    return Saved(path, *world.bcast((error, remains)))
