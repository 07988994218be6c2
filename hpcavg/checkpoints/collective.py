"""All ranks' parts of a checkpoint, written together and read again, also by another number of learners."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hpcavg.algorithms.schedule import Progress
from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import store, tensor_file
from hpcavg.checkpoints.store import Checkpoint, Manifest
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError, why


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


# -- what a learner's state is --------------------------------------------------------------------------------------


def parts(averager: Averager, loop: Mapping[str, Any]) -> dict[str, Any]:
    """Return a learner's state: its model, optimizer and averager, random numbers, and what the `loop` adds."""
    state = averager.state_dict()
    return {
        "model": averager.model.state_dict(),
        "optimizer": averager.optimizer.state_dict(),
        "means": state.pop("averaging"),  # where the mean in flight and outer momentum are all learners'
        "averager": state,
        "random": _random_state(),
        "loop": dict(loop),
    }


def restore(averager: Averager, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Give a learner the state that `parts` returned; return the loop's."""
    _fit(averager.model.load_state_dict, saved["model"], "model")
    options = [dict(group) for group in averager.optimizer.param_groups]
    _fit(averager.optimizer.load_state_dict, saved["optimizer"], "optimizer")
    for own, given in zip(options, averager.optimizer.param_groups, strict=True):  # torch looks at few of them
        check_form({name: own[name] for name in own if name != "params"}, given)
    known = {"progress": asdict(averager.progress), "totals": asdict(averager.totals)}
    for name, fields in known.items():
        check_form({name: fields}, {name: fields | saved["averager"][name]})  # some may have come since
    check_form({"loss_sum": 0.0}, saved["averager"])
    averager.load_state_dict({**saved["averager"], "averaging": saved["means"]})
    _set_random_state(saved["random"])
    return dict(saved["loop"])


def check_form(own: Any, given: Any) -> None:
    """Raise an exception that says where `given` lacks a key of `own`, or has another kind of value.

    None stands for what is not known yet, and goes with all kinds.
    """
    if isinstance(own, Mapping):
        for name, value in own.items():
            if value is not None and given[name] is not None:
                try:
                    check_form(value, given[name])
                except TypeError as error:
                    raise TypeError(f"{name}: {error}") from None
    elif isinstance(own, (int, float, str, Tensor)):
        kind = (int, float) if isinstance(own, (int, float)) else type(own)
        if not isinstance(given, kind):
            raise TypeError(f"a {type(given).__name__}")
    elif type(own) is not type(given) or len(own) != len(given):
        raise TypeError(f"a {type(given).__name__}")


def mean_model(saved: Checkpoint) -> dict[str, Tensor]:
    """Return the mean over the models of all learners that were well, summed in float64.

    What has no mean is the first learner's.
    """
    alike: dict[tuple[int, int], list[int]] = {}  # learners by where their model and state of the means are
    for rank, held in enumerate(saved.manifest.parts):
        alike.setdefault((held["model"], held["means"]), []).append(rank)
    first: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    num_learners = 0
    for ranks in alike.values():
        parts = saved.load(ranks[0], ["model", "means"])
        floats = {name: values for name, values in parts["model"].items() if values.is_floating_point()}
        if parts["means"]["awaits_mean"] or not all(bool(values.isfinite().all()) for values in floats.values()):
            continue
        num_learners += len(ranks)
        first = first or parts["model"]
        for name, values in floats.items():
            sums[name] = sums.get(name, 0) + len(ranks) * values.double()
    if not num_learners:
        raise InputError("resume", saved.path, "a checkpoint with a learner whose parameters are finite")
    return {
        name: (sums[name] / num_learners).to(values.dtype) if name in sums else values for name, values in first.items()
    }


def load_mean_model(model: nn.Module, saved: Checkpoint) -> None:
    """Give `model` the values of `mean_model`."""
    _fit(model.load_state_dict, mean_model(saved), "model")


def start_again(averager: Averager, progress: Mapping[str, Any], step: int) -> None:
    """Let the learner count on from `step`, in the round after the one that `progress` is in, with all else new."""
    kept = {name: progress[name] for name in ("first_loss", "loss")}
    averager.progress = Progress(step=step, round=progress["round"], round_step=step, mean_step=float(step), **kept)
    seed = (averager.generator.initial_seed() + step) % 2**63
    averager.generator.manual_seed(seed)
    seed_generators(seed)


def seed_generators(seed: int) -> None:
    """Let the generators that a task may draw from, torch's, NumPy's and Python's own, begin anew."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  a task's own code may use it
    random.seed(seed)


def _fit(load: Any, state: Any, what: str) -> None:
    """Call `load`; raise `InputError` where the state is another model's or optimizer's."""
    try:
        load(state)
    except (RuntimeError, ValueError, KeyError) as error:
        given = " ".join(str(error).split())
        raise InputError("resume", what, f"of the form that the checkpoint has ({given})") from error


def _random_state() -> dict[str, Any]:
    """Return the state of the generators that a task may draw from."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": np.random.get_state(),  # noqa: NPY002
        "python": random.getstate(),
    }


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])
