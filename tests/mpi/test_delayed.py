"""DaSGD: a mean in flight touches nothing, is merged when it is due, and never outlives the run."""

import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.algorithms.scope import LOCAL
from hpcavg.engines.select import ENGINES
from hpcavg.engines.shared import SharedEngine
from tests.mpi.nodes import TRIED, Nodes
from tests.mpi.problems import Logistic, Vector, values_of

pytestmark = pytest.mark.mpi


def test_a_worked_example(world):
    """Learner j adds 2 j + 1 a step: with two, t = 2: mean 4 starts; t = 3: 0.25 (3, 9) + 0.75 * 4 = (3.75, 5.25)."""
    rank, size = world.Get_rank(), world.Get_size()
    model = Vector(np.zeros(1))
    topology = Topology(world)
    rule = algorithms.dasgd(2, delay=1, xi=0.25)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=1.0), rule, topology)
    own, found = 2 * rank + 1, []
    for _ in range(5):
        model.x.grad = torch.tensor([-float(own)], dtype=torch.float64)
        averager.step()
        found.append(model.x.item())
    third = 0.25 * 3 * own + 0.75 * 2 * size
    mean_of_third = 0.25 * 3 * size + 0.75 * 2 * size
    fifth = 0.25 * (third + 2 * own) + 0.75 * (mean_of_third + size)
    assert found == pytest.approx([own, 2 * own, third, third + own, fifth], abs=1e-12)
    if size == 2:
        assert found[2:] == pytest.approx([[3.75, 4.75, 6.3125], [5.25, 8.25, 7.6875]][rank], abs=1e-12)
    averager.finish()
    topology.free()


def train(world, rule, num_steps, after_step=lambda averager, module: None):
    problem = Logistic(world.Get_size())
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    topology = Topology(world)
    averager = Averager(module, optimizer, rule, topology)
    for t in range(1, num_steps + 1):
        optimizer.zero_grad()
        problem.loss(module, world.Get_rank(), t).backward()
        averager.step()
        after_step(averager, module)
    averager.finish()
    topology.free()
    return averager, module


@settings(max_examples=8)
@given(tau=st.integers(2, 8), data=st.data())
def test_between_start_and_merge_the_parameters_are_those_of_a_run_without_averaging(world, tau, data):
    delay = data.draw(st.integers(1, tau - 1))
    alone, delayed = [], []
    train(world, algorithms.sgd(), tau + delay - 1, lambda averager, module: alone.append(values_of(module)))
    rule = algorithms.dasgd(tau, delay, 0.25)
    train(world, rule, tau + delay, lambda averager, module: delayed.append(values_of(module)))
    assert np.array_equal(alone, delayed[:-1])


@pytest.mark.parametrize("num_steps", [3, 4, 5, 6, 7, 11])
def test_a_run_ends_with_nothing_in_flight(world, num_steps):
    averager, module = train(world, algorithms.dasgd(4, 2, 0.25), num_steps)
    assert averager.totals.global_averages == num_steps // 4 + 1
    assert averager._delayed.merge_step is None
    assert len([thread for thread in threading.enumerate() if "means in progress" in thread.name]) <= 1
    values = values_of(module)
    assert np.array_equal(world.bcast(values), values)


def steps_of(averagers, num_steps, rank):
    """Let all of `averagers` take their steps in turns; return what they end with."""
    for step in range(1, num_steps + 1):
        for index, averager in enumerate(averagers):
            (x,) = averager.model.parameters()
            # Ranks come to their merges at different times, and find other means on their way.
            time.sleep(0.0005 * ((rank + step + index) % 3))
            x.grad = (x.detach() - rank) * (rank + 1) / 16
            averager.step()
    for averager in averagers:
        averager.finish()
    return [values.detach().clone() for averager in averagers for values in averager.model.parameters()]


@pytest.mark.parametrize("layout", TRIED)
@pytest.mark.parametrize("engine", ENGINES)
def test_means_of_two_averagers_on_their_way_at_once_are_those_of_one_after_the_other(world, engine, layout):
    """The second starts after the first and merges before it: at steps 4 and 7, and 5 and 6."""
    topology = Nodes(world, min(2, world.Get_size()), layout)
    rules = [algorithms.dasgd(4, 3, 0.25), algorithms.dasgd(5, 1, 0.5), algorithms.dasgd(3, 2, 0.0)]

    def make(rule, engine):
        model = nn.Module()
        model.register_parameter("x", nn.Parameter(torch.linspace(-1, 1, 60_001)))
        return Averager(model, torch.optim.SGD(model.parameters(), lr=0.5), rule, topology, engine=engine)

    if engine != "shared" or topology.num_nodes == 1:
        together = steps_of([make(rule, engine) for rule in rules], 13, topology.rank)
        alone = [steps_of([make(rule, engine)], 13, topology.rank)[0] for rule in rules]
        by_mpi = [steps_of([make(rule, "mpi")], 13, topology.rank)[0] for rule in rules]
        assert all(map(torch.equal, together, alone))
        # In another order of summation, where there are more than two terms.
        tolerance = 0.0 if world.Get_size() <= 2 else 1e-6
        assert all(torch.allclose(*pair, rtol=tolerance, atol=tolerance) for pair in zip(together, by_mpi, strict=True))
    topology.free()


def test_a_mean_that_arrives_is_accounted_for(world):
    averager, _ = train(world, algorithms.dasgd(3, 1, 0.5), 10)
    events = list(averager.events)
    assert [event.step for event in events] == [3, 6, 9, 10]
    assert [event.period_steps for event in events] == [3, 3, 3, 1]
    for event in events[:-1]:
        assert event.in_flight_s > 0
        assert event.consensus_distance >= 0
    squares = [event.consensus_distance for event in events[:-1]]
    if world.Get_size() > 1:
        assert min(squares) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
def test_every_dtype_arrives_as_the_mean_of_what_was_sent(world, dtype):
    rank, size = world.Get_rank(), world.Get_size()
    topology = Topology(world)
    model = nn.Module()
    model.register_parameter("x", nn.Parameter(torch.zeros(37, dtype=dtype)))
    rule = algorithms.dasgd(2, 1, 0.0)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=1.0), rule, topology)
    for _ in range(3):
        model.x.grad = torch.full((37,), -float(rank), dtype=dtype)
        averager.step()
    expected = torch.full((37,), float(size - 1), dtype=dtype)  # twice the mean of 0 .. P - 1
    assert torch.equal(model.x.detach(), expected)
    averager.finish()
    topology.free()


def test_buffers_travel_with_the_delayed_mean(world):
    rank, size = world.Get_rank(), world.Get_size()
    topology = Topology(world)
    model = nn.BatchNorm1d(2)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=0.0), algorithms.dasgd(2, 1, 0.25), topology)
    for step in (1, 2, 3):
        with torch.no_grad():
            model.running_mean.fill_(rank + step)
        averager.step()
    mean_at_2 = (size - 1) / 2 + 2
    assert model.running_mean.tolist() == pytest.approx([0.25 * (rank + 3) + 0.75 * mean_at_2] * 2)
    averager.finish()
    topology.free()


@pytest.mark.parametrize("stop", [5, 6, 7])
def test_a_resumed_run_is_bit_identical_with_a_mean_in_flight(world, stop):
    problem = Logistic(world.Get_size())

    def make():
        module = problem.module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
        topology = Topology(world)
        return module, optimizer, topology, Averager(module, optimizer, algorithms.dasgd(3, 2, 0.25), topology)

    def steps(module, optimizer, averager, first, last):
        for t in range(first, last + 1):
            optimizer.zero_grad()
            problem.loss(module, world.Get_rank(), t).backward()
            averager.step()

    whole, optimizer, whole_topology, averager = make()
    steps(whole, optimizer, averager, 1, 10)
    averager.finish()
    first, optimizer, first_topology, averager = make()
    steps(first, optimizer, averager, 1, stop)
    saved = first.state_dict(), optimizer.state_dict(), averager.state_dict()
    second, optimizer, second_topology, averager = make()
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    averager.load_state_dict(saved[2])
    steps(second, optimizer, averager, stop + 1, 10)
    averager.finish()
    assert np.array_equal(values_of(second), values_of(whole))
    for topology in (whole_topology, first_topology, second_topology):
        topology.free()


def test_averaging_the_optimizers_state_does_not_go_with_a_delay(world):
    topology = Topology(world)
    model = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.raises(InputError, match="delay = 2"):
        Averager(model, optimizer, algorithms.dasgd(), topology, optimizer_state="average")
    topology.free()


def test_a_mean_of_groups_one_of_which_has_one_learner(node):
    """Three ranks make groups of 2 and 1. The memory for copies is made by all learners together."""
    topology = Topology(node, group_size=min(2, node.Get_size()))
    engine = SharedEngine(topology)
    rows = engine.allocate(torch.zeros(1, 100_000))
    rows.fill_(topology.rank)
    (mean,) = engine.start([rows], LOCAL).wait()
    assert mean.unique().tolist() == [np.mean(topology.ranks_of(LOCAL))]
    topology.free()
