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
    """How writing a checkpoint went. One that was not written counts for nothing; earlier ones are unchanged.

    Parameters
    ----------
    path : Path
        The checkpoint's folder.
    error : str or None
        Why it could not be written; None if it was.
    remains : sequence of str
        Why older checkpoints could not be removed.
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
    """Write a checkpoint of all learners. Collective over them. A part that several learners hold is written once.

    Parameters
    ----------
    topology : Topology
        The learners.
    folder : Path
        Where the checkpoints are.
    keep : int
        How many checkpoints to keep; older ones are removed.
    step : int
        The step that all learners have reached.
    parts : mapping
        This learner's state by part.
    about : mapping
        What the manifest says of the run, on rank 0.
    guard : callable
        Rank 0 calls it before it changes the folder. It does not return if the folder is another run's by now.
    """
    world = topology.learner_ranks
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
