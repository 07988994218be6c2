"""Models and random generators of a rank's learners, by learner."""

import random

import numpy as np
import pytest
import torch
from torch import nn

from hpcavg import stack
from hpcavg.checkpoints import random_state
from hpcavg.errors import InputError
from hpcavg.training.learners import Learners


def dropped(stacked):
    """Return which inputs each learner's dropout keeps."""
    return stacked(torch.ones(2, 1, 50)) != 0


def test_each_learner_draws_what_it_would_alone_and_goes_on_elsewhere():
    stacked = stack(nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)), 2)
    learners = Learners(stacked)
    learners.seed([7, 8])
    first = dropped(stacked)
    saved = [learners.random_of(row) for row in range(2)]
    second = dropped(stacked)
    for row, seed in enumerate((7, 8)):
        alone = Learners(stacked.module)
        alone.seed([seed])
        kept = [nn.functional.dropout(torch.ones(1, 50), 0.5, True) != 0 for _ in range(2)]
        assert torch.equal(first[row], kept[0])
        assert torch.equal(second[row], kept[1])
        alone.load_random([saved[row]])  # on a rank of its own
        assert torch.equal(nn.functional.dropout(torch.ones(1, 50), 0.5, True) != 0, kept[1])
    learners.load_random(saved[::-1])  # on a rank with the same learners in another order
    assert torch.equal(dropped(stacked), second.flip(0))


def test_numpy_and_python_are_those_of_the_first_learner():
    stacked = stack(nn.Linear(2, 1), learners=2)
    learners = Learners(stacked)
    learners.seed([7, 8])
    seen = random.random(), np.random.random()  # noqa: NPY002
    random_state.seed_generators(7)
    assert seen == (random.random(), np.random.random())  # noqa: NPY002
    other = learners.random_of(1)
    random_state.seed_generators(8)
    assert other["python"] == random.getstate()


def test_fast_learners_share_torchs_generator():
    stacked = stack(nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)), 2, randomness="fast")
    learners = Learners(stacked, own_streams=False)
    learners.seed([7, 8])
    first = dropped(stacked)
    assert not torch.equal(first[0], first[1])
    saved = [learners.random_of(row) for row in range(2)]
    second = dropped(stacked)
    learners.load_random(saved)
    assert torch.equal(dropped(stacked), second)
    assert learners.way == "vmap"


def test_the_way_says_why_learners_compute_one_after_the_other():
    assert Learners(nn.Linear(2, 1)).way is None
    stacked = stack(nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.5)), 2)
    dropped(stacked)
    assert Learners(stacked).way == "loop: random layers draw for each learner alone, with --stacked-randomness exact"


def test_states_are_those_of_plain_models():
    learners = Learners(stack(nn.Linear(2, 1), learners=2))
    states = [{"weight": torch.full((1, 2), number), "bias": torch.zeros(1)} for number in (1.0, 2.0)]
    learners.load_states(states)
    assert [learners.state_of(row)["weight"].tolist() for row in range(2)] == [[[1.0, 1.0]], [[2.0, 2.0]]]
    with pytest.raises(InputError, match="resume='model': must be of the form that the checkpoint has"):
        learners.load_states([{"weight": torch.zeros(3, 2), "bias": torch.zeros(3)}] * 2)
