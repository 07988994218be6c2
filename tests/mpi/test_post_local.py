"""Post-local SGD, step for step, against an oracle made from the paper alone and against torch's own averager."""

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.nn.parallel import DistributedDataParallel

from hpcavg import Averager, Topology, algorithms
from tests.mpi.problems import Quadratic, TwoLayers, values_of
from tests.oracles import post_local

pytestmark = pytest.mark.mpi

RATE = 0.05
STEPS = 20
# (switch_step, k): from the start; k that divides the switch and does not; longer than it; every step; never reached
SETTINGS = [(0, 4), (4, 2), (7, 3), (1, 11), (5, 1), (40, 6)]


def held_by_hpcavg(world, problem, switch_step, k):
    """Return what this learner holds after each step."""
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    topology = Topology(world)
    averager = Averager(module, optimizer, algorithms.post_local_sgd(switch_step, k), topology)
    held = []
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        problem.loss(module, world.Get_rank(), t).backward()
        averager.step()
        held.append(values_of(module))
    topology.free()
    return np.array(held)


def held_by_torch(world, problem, start_iter, warmup_steps, period):
    """Return the same of torch's DistributedDataParallel, hook, optimizer and averager."""
    model = DistributedDataParallel(_Loss(problem, world.Get_rank()))
    state = PostLocalSGDState(None, None, start_iter, post_local_gradient_allreduce=False)
    model.register_comm_hook(state, post_localSGD_hook)
    averager = PeriodicModelAverager(period, warmup_steps)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    held = []
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        model(t).backward()
        optimizer.step()
        averager.average_parameters(optimizer.param_groups)  # what torch's PostLocalSGDOptimizer does at each step
        held.append(values_of(model))
    return np.array(held)


class _Loss(torch.nn.Module):
    """A problem's loss as what a module returns, which torch's wrapper wants."""

    def __init__(self, problem, learner):
        super().__init__()
        self.problem, self.learner = problem, learner
        self.inner = problem.module()

    def forward(self, t):
        return self.problem.loss(self.inner, self.learner, t)


@pytest.fixture
def gloo(world):
    """Let torch.distributed join the same ranks, by a port that rank 0 has found free."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    rank, size = world.Get_rank(), world.Get_size()
    store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False) if rank == 0 else None
    port = world.bcast(None if store is None else store.port)
    if store is None:
        store = dist.TCPStore("127.0.0.1", port, size, is_master=False, wait_for_workers=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    yield
    world.Barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("make_problem", [Quadratic, TwoLayers])
@pytest.mark.parametrize(("switch_step", "k"), SETTINGS)
def test_agrees_with_the_paper_at_every_step(world, make_problem, switch_step, k):
    problem = make_problem(world.Get_size())
    expected = post_local.run(switch_step, k, RATE, problem.x0, world.Get_size(), problem.gradient, STEPS)
    assert_same(held_by_hpcavg(world, problem, switch_step, k), expected[:, world.Get_rank()])


def test_agrees_with_torchs_averager_at_every_step(world, gloo):
    problem = TwoLayers(world.Get_size())
    for switch_step, k in SETTINGS[:4]:
        found = held_by_hpcavg(world, problem, switch_step, k)
        # Gradients up to the switch, then parameters.
        assert_same(found, held_by_torch(world, problem, switch_step, switch_step + k - 1, k))
        if switch_step > 0:  # as torch asks for: the two alike; its averager then begins at the switch itself
            assert_same(found, held_by_torch(world, problem, switch_step - 1, switch_step - 1, k))


def assert_same(found, expected):
    errors = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    wrong = 1 + np.flatnonzero(errors > 1e-12)
    assert not len(wrong), f"from step {wrong[0]}"
