"""A checkpoint of all learners, written together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hpcavg.checkpoints import store, tensor_file
from hpcavg.checkpoints.store import Manifest
from hpcavg.distributed.topology import Topology
from hpcavg.errors import why
from hpcavg.utils.files import FileRecord


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
    parts: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    guard: Callable[[], None] = lambda: None,
) -> Saved:
    """Write a checkpoint of all learners. Collective over them. A part that several learners hold is written once.

    Every learner has a file, whichever rank holds it: with other numbers of learners per rank the files are the same.

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
    parts : sequence of mappings
        The state of each learner of this rank, by part.
    about : mapping
        What the manifest says of the run, on rank 0.
    guard : callable
        Rank 0 calls it before it changes the folder. It does not return if the folder is another run's by now.
    """
    world = topology.learner_ranks
    own = [{name: tensor_file.digest(part) for name, part in of_learner.items()} for of_learner in parts]
    holders: dict[tuple[str, str], int] = {}  # the first learner that has a part
    places = [
        {name: holders.setdefault((name, value), learner) for name, value in digests.items()}
        for learner, digests in enumerate(chain(*world.allgather(own)))
    ]
    path, error = folder, None
    if world.Get_rank() == 0:
        guard()
        try:
            path = store.create(folder, step, len(places))
        except OSError as raised:
            error = why(raised)
    path, error = world.bcast((path, error))
    if error is not None:
        return Saved(path, error)
    written: list[FileRecord] = []
    try:
        for learner, of_learner in zip(topology.learners, parts, strict=True):
            held = {name: of_learner[name] for name, at in places[learner].items() if at == learner}
            written.append(store.write_rank(path, learner, held))
    except OSError as raised:
        error = why(raised)
    records, errors = zip(*world.allgather((written, error)), strict=True)
    error = next(filter(None, errors), None)
    remains: list[str] = []
    if world.Get_rank() == 0:
        guard()
        try:
            if error is None:
                store.commit(path, Manifest(step, len(places), list(chain(*records)), places, dict(about)))
        except OSError as raised:
            error = why(raised)
        guard()
        if error is None:
            remains = store.prune(folder, keep)
        else:
            store.discard(path)
    return Saved(path, *world.bcast((error, remains)))
