"""Sick learners are left out and restored; silent corruption is found and named."""

import math

import numpy as np
import pytest
import torch

from hpcavg import Averager, Topology, algorithms
from tests.mpi.problems import Vector

pytestmark = pytest.mark.mpi

BAD = [math.nan, math.inf, -math.inf]


def make(world, rule, module, optimizer=None, topology=None, **options):
    topology = topology or Topology(world, min(2, world.Get_size()))
    optimizer = optimizer or torch.optim.SGD(module.parameters(), lr=1.0)
    return topology, Averager(module, optimizer, rule, topology, **options)


def move(averager, model, by):
    """Take a step by which a parameter vector changes by `by`."""
    model.x.grad = torch.full_like(model.x, -by)
    averager.step()


def infect(tensor, value=math.nan):
    with torch.no_grad():
        tensor.view(-1)[tensor.numel() // 2] = value


@pytest.mark.parametrize("value", BAD)
def test_a_worked_example(world, value):
    """Learner j adds 2 j + 1 a step; without learner 1 of three, (1, -, 5) -> (2, -, 10) -> 6 on all of them."""
    rank, size = world.Get_rank(), world.Get_size()
    if size == 1:
        pytest.skip("nobody would be left")
    model = Vector(np.zeros(3))
    topology, averager = make(world, algorithms.k_avg(2), model)
    healthy = [2 * j + 1 for j in range(size) if j != 1]
    for _ in range(2):
        if rank == 1:
            infect(model.x, value)
        move(averager, model, 2 * rank + 1)
    expected = 2 * sum(healthy) / len(healthy)
    assert model.x.tolist() == pytest.approx([expected] * 3, rel=4e-16)
    assert [(event.sick, event.excluded) for event in averager.events] == [((1,), 1)]
    assert averager.totals.excluded == 1
    move(averager, model, 2 * rank + 1)
    assert model.x.tolist() == pytest.approx([expected + 2 * rank + 1] * 3, rel=4e-16)
    topology.free()
