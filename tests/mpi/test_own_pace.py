"""Learners that take different numbers of steps in a round (PR-SGD, Algorithm 3), and rules that follow a loss."""

import time

import numpy as np
import pytest
import torch

from hpcavg import Averager, InputError, Topology, algorithms
from tests.mpi.problems import Vector

pytestmark = pytest.mark.mpi

STEP_S = 0.004


def run(world, rule, slowdown, **options):
    """Train until done with steps that do nothing but sleep, rank 0 `slowdown` times as long."""
    topology = Topology(world)
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, rule, topology, **options)
    started = time.perf_counter()
    while not averager.done:
        time.sleep(STEP_S * (slowdown if world.Get_rank() == 0 else 1))
        model.x.grad = -torch.ones(1, dtype=torch.float64)
        averager.step()
    wall_s = time.perf_counter() - started
    averager.finish()
    topology.free()
    return averager, wall_s


def test_the_measured_steps_follow_the_speeds(world):
    averager, _ = run(world, algorithms.pr_sgd_hetero(local_steps="auto", base_steps=6), 3, total_steps=42)
    periods = [event.period_steps for event in averager.events]
    assert periods[0] == 6
    assert len(set(periods[1:-1])) == 1  # the last one may be cut
    all_periods = world.allgather(periods[1])
    if world.Get_size() > 1:
        assert all_periods[0] == 6
        assert min(all_periods[1:]) > 9  # 18 on a quiet machine; benchmarks/own_pace.py measures it


def test_fast_learners_step_instead_of_waiting(world):
    """The shares of a quiet machine are measured by benchmarks/own_pace.py."""
    waited = {}
    for rule in (algorithms.pr_sgd_hetero(epoch_seconds=0.2), algorithms.k_avg(20)):
        averager, wall_s = run(world, rule, 3, total_steps=60)
        waited[rule.name] = world.allgather(averager.totals.blocked_s / wall_s)
        steps = world.allgather(averager.progress.step)
        if world.Get_size() > 1:
            assert (steps[0] < steps[1]) == (rule.name == "pr_sgd_hetero")
    if world.Get_size() > 1:
        assert max(waited["pr_sgd_hetero"][1:]) < min(waited["k_avg"][1:])


def test_all_learners_stop_at_the_same_mean(world):
    size, rank = world.Get_size(), world.Get_rank()
    local_steps = [1 + learner for learner in range(size)]
    averager, _ = run(world, algorithms.pr_sgd_hetero(local_steps=local_steps), 1, total_steps=10)
    mean_steps = sum(local_steps) / size
    assert averager.progress.round == -(-10 // mean_steps)
    whole, left = divmod(10, mean_steps)
    assert 0 <= averager.progress.step - whole * local_steps[rank] <= local_steps[rank] * (left > 0)
    assert averager.agreed_step == 10


def test_a_list_of_another_length_is_refused(world):
    topology = Topology(world)
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rule = algorithms.pr_sgd_hetero(local_steps=[2] * (world.Get_size() + 1))
    with pytest.raises(InputError, match=f"{world.Get_size()} numbers"):
        Averager(model, optimizer, rule, topology)
    topology.free()


def test_periods_grow_as_the_agreed_loss_falls(world):
    """The learners' mean losses over the periods are 8, 8, 1, ...: factors ceil(1), ceil(1), ceil(2)."""
    size, rank = world.Get_size(), world.Get_rank()
    topology = Topology(world)
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, algorithms.ada_lupa(2, growth="loss"), topology)
    for t in range(1, 11):
        model.x.grad = torch.zeros(1, dtype=torch.float64)
        loss = 8.0 if t <= 4 else 1.0
        # no learner alone sees this loss, except where it is alone
        averager.step(loss + 0.25 * (rank - (size - 1) / 2) + (0.125 if t % 2 else -0.125))
    assert [event.period_steps for event in averager.events] == [2, 2, 2, 4]
    with pytest.raises(InputError, match="loss"):
        averager.step()
    averager.finish()
    topology.free()


def test_what_all_do_together_is_refused_where_a_learner_is_alone(world):
    """The other learners' next mean would meet something else, and all would wait for ever."""
    size, rank = world.Get_size(), world.Get_rank()
    topology = Topology(world)
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    rule = algorithms.pr_sgd_hetero(local_steps=[2 + learner for learner in range(size)])
    averager = Averager(model, optimizer, rule, topology)
    model.x.grad = torch.zeros(1, dtype=torch.float64)
    averager.step()
    if size > 1:
        assert averager.agreed_step is None
        with pytest.raises(InputError, match="own pace"):
            averager.finish()
        with pytest.raises(InputError, match="own pace"), averager.mean_model():
            pass
    for _ in range(1 + rank):
        averager.step()
    averager.finish()
    topology.free()
