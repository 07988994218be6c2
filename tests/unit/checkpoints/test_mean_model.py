"""The mean model of a checkpoint, from which another number of learners goes on."""

import pytest
import torch

from hpcavg.checkpoints import store
from hpcavg.checkpoints.mean_model import mean_model
from hpcavg.checkpoints.store import Manifest
from hpcavg.errors import InputError


def saved(folder, learners):
    """Return a checkpoint of learners given as pairs of a parameter's values and whether they await a mean."""
    path = store.create(folder, 8, len(learners))
    files, places = [], []
    for rank, (values, awaits_mean) in enumerate(learners):
        model = {"weight": torch.tensor(values), "count": torch.tensor(10 + rank)}
        parts = {"model": model, "means": {"awaits_mean": awaits_mean}}
        files.append(store.write_rank(path, rank, parts))
        places.append(dict.fromkeys(parts, rank))
    store.commit(path, Manifest(8, len(learners), files, places, {}))
    return store.open_checkpoint(path)


def test_the_mean_model_leaves_out_learners_that_are_sick(tmp_path):
    learners = [([torch.nan, 1.0], False), ([1.0, 2.0], False), ([0.0, 0.0], True), ([2.0, 6.0], False)]
    mean = mean_model(saved(tmp_path, learners))
    assert mean["weight"].tolist() == [1.5, 4.0]
    assert mean["count"].item() == 11  # the first one's that is well


def test_a_checkpoint_of_sick_learners_only_has_no_mean_model(tmp_path):
    with pytest.raises(InputError, match="a learner whose parameters are finite"):
        mean_model(saved(tmp_path, [([torch.inf, 1.0], False)]))
