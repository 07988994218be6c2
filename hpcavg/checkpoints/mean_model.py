"""The mean model of a checkpoint, from which another number of learners goes on."""

from __future__ import annotations

from torch import Tensor, nn

from hpcavg.checkpoints.form import load_fitting
from hpcavg.checkpoints.store import Checkpoint
from hpcavg.errors import InputError


def mean_model(saved: Checkpoint) -> dict[str, Tensor]:
    """Return the mean of the models of all learners whose parameters are finite, summed in float64.

    Integers have no mean: they are those of the first of these learners.
    """
    alike: dict[tuple[int, int], list[int]] = {}  # learners by the files of their model and of their means
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
    load_fitting(model.load_state_dict, mean_model(saved), "model")
