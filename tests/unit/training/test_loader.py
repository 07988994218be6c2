"""Mini-batches of several learners in a rank: each learner's are those that it would have in a rank of its own."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcavg.config.options import Config
from hpcavg.distributed.topology import Topology
from hpcavg.tasks import Data, Samples, Task
from hpcavg.training.loader import BatchLoader

LEARNERS = 3


class InFiles(Samples):
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return [f"{number}" for number in index]  # which only a transform understands


def _task(inputs, transform):
    rng = np.random.default_rng(0)
    tests = np.arange(8, dtype=np.float32)[:, None]
    data = Data(inputs, rng.integers(4, size=50), tests, np.arange(8) % 4)
    return Task("numbers", lambda: torch.nn.Linear(1, 4), lambda: data, transform=transform)


def _noisy(inputs, generator):
    if isinstance(inputs, list):
        inputs = torch.tensor([[float(number)] for number in inputs])
    return inputs if generator is None else inputs + torch.rand(inputs.shape, generator=generator)


@contextmanager
def loaders(task, **options):
    """Yield the loader of a rank with all learners, and those of ranks with one learner each."""
    together = Topology(MPI.COMM_SELF, learners_per_rank=LEARNERS)
    apart = [Topology(MPI.COMM_SELF) for _ in range(LEARNERS)]
    for learner, topology in enumerate(apart):
        topology.num_learners, topology.learners = LEARNERS, range(learner, learner + 1)
    config, device = Config(**options), torch.device("cpu")
    yield BatchLoader(task, config, together, device), [BatchLoader(task, config, one, device) for one in apart]
    for topology in (together, *apart):
        topology.free()


def assert_same(together, apart):
    assert torch.equal(together, torch.stack(apart))


@pytest.mark.parametrize("partition", ["shard", "shared", "by-class", "dirichlet"])
@pytest.mark.parametrize("transform", [None, _noisy])
@pytest.mark.parametrize("loader_threads", [0, 2])
def test_batches_are_those_of_ranks_with_one_learner(partition, transform, loader_threads):
    inputs = np.arange(50, dtype=np.float32)[:, None]
    options = {"batch_size": 4, "partition": partition, "loader_threads": loader_threads}
    with loaders(_task(inputs, transform), **options) as (together, apart):
        steps = together.steps_per_epoch
        assert steps == apart[0].steps_per_epoch == 5
        for step in range(2 * steps + 1):
            if step % steps == 0:
                counts = np.stack([one.about()["label_counts"] for one in apart])
                assert np.array_equal(together.about()["label_counts"], counts)
            epochs, inputs, targets = together.next()
            each = [one.next() for one in apart]
            assert epochs == [step // steps] * LEARNERS
            assert_same(inputs, [one[1] for one in each])
            assert_same(targets, [one[2] for one in each])
        assert inputs.shape == (LEARNERS, 4, 1)
        for batch, *each in zip(*(one.train_inputs(1) for one in (together, *apart)), strict=True):
            assert_same(batch, each)
        alone = [next(one.test_batches()) for one in apart]  # 8 samples: parts of 3, 3 and 2
        for rows, *own in together.test_batches_of_learners():
            for batches, each in zip(own, zip(*alone[rows], strict=True), strict=True):
                assert_same(batches, each)
        assert [rows for rows, *_ in together.test_batches_of_learners()] == [slice(0, 2), slice(2, 3)]
        assert len(next(together.test_batches())[0]) == 8
        assert torch.equal(together.first(2)[0], apart[0].first(2)[0])
        assert together.peek()[0].shape == (LEARNERS, 4, 1)


def test_samples_in_files_go_to_the_transform_of_each_learner():
    with loaders(_task(InFiles(), _noisy), batch_size=5) as (together, apart):
        assert_same(together.next()[1], [one.next()[1] for one in apart])


@pytest.mark.parametrize("loader_threads", [0, 2])
def test_learners_that_wait_keep_their_position(loader_threads):
    inputs = np.arange(50, dtype=np.float32)[:, None]
    options = {"batch_size": 4, "loader_threads": loader_threads, "drop_last": True}
    with loaders(_task(inputs, None), **options) as (together, apart):
        for active in ([0, 1, 2], [1], [1, 2], [1, 2], [0, 1, 2], [0]):
            _, inputs, _ = together.next(active)
            for row in active:
                assert torch.equal(inputs[row], apart[row].next()[1])
        assert together.positions == [(0, 3), (1, 1), (1, 0)]  # of 4 steps in an epoch
        together.go_to([(2, 1)] * LEARNERS)
        for one in apart:
            one.go_to([(2, 1)])
        assert_same(together.next()[1], [one.next()[1] for one in apart])
