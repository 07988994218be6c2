"""Every rule against the NumPy oracle: three problems, three optimizers, up to 200 steps, on all ranks."""

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcavg import Averager, Topology, algorithms, stack
from hpcavg.averaging import small_arrays
from hpcavg.distributed.waiting import wait_asleep
from tests.mpi.nodes import Nodes
from tests.mpi.problems import PROBLEMS, rows_of, stacked_loss, values_of
from tests.oracles import synchronous

pytestmark = pytest.mark.mpi

# More ranks share the cores of a small machine. 60 steps are several rounds of every rule.
STEPS = {1: 200, 2: 200, 8: 60}.get(MPI.COMM_WORLD.Get_size(), 100)
BATCH_SIZE = 5
RULES = [
    ("one_shot", {}, 1),
    ("sync_sgd", {}, 1),
    ("sync_sgd", {"variant": "gradients"}, 1),
    ("k_avg", {"k": 7}, 1),
    ("hier_avg", {"k1": 2, "k2": 8}, 2),
    ("hier_avg", {"k1": 3, "k2": 10}, 3),
    ("pr_sgd", {"interval": 5}, 1),
    ("pr_sgd_time_varying", {}, 1),
    ("post_local_sgd", {"switch_step": 50, "k": 6}, 1),
    ("lupa", {"tau": 6}, 1),
    ("lupa", {"tau": "auto", "mu": 0.5}, 1),
    ("lupa", {"tau": 9, "mu": 1.0, "shift": 80.0}, 1),
    ("ada_lupa", {"tau0": 3, "alpha": 0.4}, 1),
    ("ada_lupa", {"tau0": 5, "rounds": 11, "mu": 0.5}, 1),
    ("ada_lupa", {"tau0": 4, "growth": "loss"}, 1),
    ("dasgd", {"tau": 4, "delay": 2, "xi": 0.25}, 1),
    ("dasgd", {"tau": 6, "delay": 5, "xi": 0.0}, 1),
    ("dasgd", {"tau": 5, "delay": 0, "xi": 0.6}, 1),
    ("slowmo", {"k": 8, "beta": 0.6, "outer_lr": 0.9}, 1),
    ("diloco", {"h": 9, "outer_lr": 0.7, "outer_momentum": 0.9}, 1),
    ("diloco", {"h": 5, "outer_lr": 0.8, "outer_momentum": 0.0}, 1),
]
OPTIMIZERS = {
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
# Every rule meets every problem and every optimizer.
CASES = [("quadratic", "momentum"), ("logistic", "nesterov"), ("two_layers", "adam")]
# How the arrays travel: by the engine of one node; or between nodes of two ranks, with the reports or by an engine.
WAYS = ["reports", "shared memory", "chunks:2:4", "allreduce:1:4", "allreduce:2"]


@pytest.mark.parametrize(("problem_name", "optimizer_name"), CASES)
@pytest.mark.parametrize(("name", "options", "group_size"), RULES, ids=lambda value: str(value))
def test_agrees_with_the_oracle_at_every_step(
    name, options, group_size, problem_name, optimizer_name, world, monkeypatch
):
    rank, size = world.Get_rank(), world.Get_size()
    case = RULES.index((name, options, group_size)) + CASES.index((problem_name, optimizer_name))
    way = WAYS[case % len(WAYS)]  # in turns
    if way != "reports":
        monkeypatch.setattr(small_arrays, "_GATHERED_BYTES", 0)
    group_size = min(group_size, size)
    make_optimizer, make_local = OPTIMIZERS[optimizer_name]
    problem = PROBLEMS[problem_name](size)
    common = (problem.x0, problem.gradient, STEPS, size, group_size, problem.losses, BATCH_SIZE)
    expected, expected_mean = from_rank_0(world, lambda: synchronous.run(name, options, make_local(), *common))
    module = problem.module()
    optimizer = make_optimizer(module.parameters())
    topology = Topology(world, group_size) if way == "shared memory" else Nodes(world, group_size, "nodes of 2")
    crossing = way if ":" in way and topology.num_nodes > 1 else None
    rule = algorithms.build(name, options)
    averager = Averager(module, optimizer, rule, topology, total_steps=STEPS, batch_size=BATCH_SIZE, crossing=crossing)
    for t in range(1, STEPS + 1):
        optimizer.zero_grad()
        loss = problem.loss(module, rank, t)
        loss.backward()
        averager.step(loss)
        assert relative_error(values_of(module), expected[t - 1, rank]) <= 1e-12, t
    averager.finish()
    assert relative_error(values_of(module), expected_mean) <= 1e-12
    topology.free()


@pytest.mark.parametrize(("problem_name", "optimizer_name"), CASES)
def test_learners_at_their_own_pace_agree_with_the_oracle_after_every_round(problem_name, optimizer_name, world):
    rank, size = world.Get_rank(), world.Get_size()
    make_optimizer, make_local = OPTIMIZERS[optimizer_name]
    problem = PROBLEMS[problem_name](size)
    local_steps, rounds = [2 + 3 * learner % 5 for learner in range(size)], 50
    common = (problem.x0, problem.gradient, rounds)
    expected = from_rank_0(world, lambda: synchronous.run_hetero(local_steps, make_local, *common))
    module = problem.module()
    optimizer = make_optimizer(module.parameters())
    topology = Topology(world)
    averager = Averager(module, optimizer, algorithms.pr_sgd_hetero(local_steps=local_steps), topology)
    for t in range(1, rounds * local_steps[rank] + 1):
        optimizer.zero_grad()
        problem.loss(module, rank, t).backward()
        averager.step()
        if averager.progress.step == averager.progress.round_step:
            assert relative_error(values_of(module), expected[averager.progress.round - 1]) <= 1e-12, t
    assert averager.progress.round == rounds
    topology.free()


# Several learners in a rank, up to eight in all; a stack of one on eight ranks, for which rules meet cases in turns.
MANY = [learners for learners in (2, 3) if learners * MPI.COMM_WORLD.Get_size() <= 8] or [1]
MEETINGS = [
    (rule, case) for rule in range(len(RULES)) for case in range(len(CASES)) if MANY != [1] or (rule - case) % 3 == 0
]


@pytest.mark.parametrize("learners", MANY)
@pytest.mark.parametrize(("rule", "case"), MEETINGS)
def test_learners_of_a_rank_agree_with_the_oracle_at_every_step(rule, case, learners, world, monkeypatch):
    size, steps = learners * world.Get_size(), 60
    name, options, group_size = RULES[rule]
    problem_name, optimizer_name = CASES[case]
    way = WAYS[(rule + case) % len(WAYS)]
    if way != "reports":
        monkeypatch.setattr(small_arrays, "_GATHERED_BYTES", 0)
    if group_size % learners and learners % group_size:
        group_size += 1
    group_size = min(group_size, size)
    make_optimizer, make_local = OPTIMIZERS[optimizer_name]
    problem = PROBLEMS[problem_name](size)
    common = (problem.x0, problem.gradient, steps, size, group_size, problem.losses, BATCH_SIZE)
    expected, expected_mean = from_rank_0(world, lambda: synchronous.run(name, options, make_local(), *common))
    stacked = stack(problem.module(), learners)
    optimizer = make_optimizer(stacked.parameters())
    topology = Nodes(world, group_size, "one node" if way == "shared memory" else "nodes of 2", learners)
    crossing = way if ":" in way and topology.num_nodes > 1 else None
    algorithm = algorithms.build(name, options)
    told = {"total_steps": steps, "batch_size": BATCH_SIZE, "crossing": crossing}
    averager = Averager(stacked, optimizer, algorithm, topology, **told)
    here = slice(topology.learners.start, topology.learners.stop)
    for t in range(1, steps + 1):
        optimizer.zero_grad()
        losses = stacked_loss(problem, stacked, topology.learners, t)
        losses.sum().backward()
        averager.step(losses)
        assert relative_error(rows_of(stacked), expected[t - 1, here]) <= 1e-12, t
    averager.finish()
    assert relative_error(rows_of(stacked), np.tile(expected_mean, (learners, 1))) <= 1e-12
    topology.free()


@pytest.mark.parametrize("learners", MANY)
@pytest.mark.parametrize(("problem_name", "optimizer_name"), CASES)
def test_learners_of_a_rank_at_their_own_pace_agree_with_the_oracle(problem_name, optimizer_name, learners, world):
    size, rounds = learners * world.Get_size(), 10
    make_optimizer, make_local = OPTIMIZERS[optimizer_name]
    problem = PROBLEMS[problem_name](size)
    local_steps = [2 + 3 * learner % 5 for learner in range(size)]
    common = (problem.x0, problem.gradient, rounds)
    expected = from_rank_0(world, lambda: synchronous.run_hetero(local_steps, make_local, *common))
    stacked = stack(problem.module(), learners)
    optimizer = make_optimizer(stacked.parameters())
    topology = Topology(world, learners_per_rank=learners)
    averager = Averager(stacked, optimizer, algorithms.pr_sgd_hetero(local_steps=local_steps), topology)
    while averager.progress.round < rounds:
        optimizer.zero_grad()
        for row in averager.active:
            t = averager.progress_of[row].step + 1
            stacked_loss(problem, stacked, topology.learners, t)[row].backward()
        averager.step()
        if averager.agreed_step is not None:
            means = np.tile(expected[averager.progress.round - 1], (learners, 1))
            assert relative_error(rows_of(stacked), means) <= 1e-12
    assert [progress.step for progress in averager.progress_of] == [
        rounds * local_steps[learner] for learner in topology.learners
    ]
    topology.free()


def from_rank_0(world, compute):
    """Return what `compute` returns on rank 0. The others sleep meanwhile, and leave it the cores."""
    result = compute() if world.Get_rank() == 0 else None
    wait_asleep(world)
    return world.bcast(result)


def relative_error(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)
