"""Every rule against the NumPy oracle: three problems, several optimizers, 200 steps, on all ranks."""

import numpy as np
import pytest
import torch

from hpcavg import Averager, Topology, algorithms
from tests.mpi.problems import PROBLEMS, values_of
from tests.oracles import synchronous

pytestmark = pytest.mark.mpi

STEPS = 200
RULES = [
    ("one_shot", {}, 1),
    ("sync_sgd", {}, 1),
    ("sync_sgd", {"variant": "gradients"}, 1),
    ("k_avg", {"k": 7}, 1),
    ("hier_avg", {"k1": 2, "k2": 8}, 2),
    ("hier_avg", {"k1": 3, "k2": 10}, 3),
    ("pr_sgd", {"interval": 5}, 1),
    ("post_local_sgd", {"switch_step": 50, "k": 6}, 1),
]
OPTIMIZERS = {
    "plain": (lambda p: torch.optim.SGD(p, lr=0.05), lambda: synchronous.LocalSgd(0.05)),
    "momentum": (
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
        lambda: synchronous.LocalSgd(0.02, momentum=0.9, weight_decay=0.01),
    ),
    "nesterov": (
        lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.8, nesterov=True),
        lambda: synchronous.LocalSgd(0.02, momentum=0.8, nesterov=True),
    ),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), lambda: synchronous.LocalAdam(0.01)),
}
# Every optimizer on the problem that is exact, and each of the others with two of them.
CASES = [("quadratic", name) for name in OPTIMIZERS]
CASES += [("logistic", "momentum"), ("logistic", "adam"), ("two_layers", "nesterov"), ("two_layers", "adam")]


@pytest.mark.parametrize(("problem_name", "optimizer_name"), CASES)
@pytest.mark.parametrize(("name", "options", "group_size"), RULES, ids=lambda value: str(value))
def test_agrees_with_the_oracle_at_every_step(name, options, group_size, problem_name, optimizer_name, world):
    rank, size = world.Get_rank(), world.Get_size()
    group_size = min(group_size, size)
    make_optimizer, make_local = OPTIMIZERS[optimizer_name]
    problem = PROBLEMS[problem_name](size)
    expected = expected_mean = None
    if rank == 0:
        expected, expected_mean = synchronous.run(
            name, options, make_local(), problem.x0, problem.gradient, STEPS, size, group_size
        )
    expected, expected_mean = world.bcast((expected, expected_mean))
    module = problem.module()
    optimizer = make_optimizer(module.parameters())
    topology = Topology(world, group_size)
    averager = Averager(module, optimizer, algorithms.build(name, options), topology)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        problem.loss(module, rank, t).backward()
        averager.step()
        assert relative_error(values_of(module), expected[t - 1, rank]) <= 1e-12, t
    averager.finish()
    assert relative_error(values_of(module), expected_mean) <= 1e-12
    topology.free()


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
