"""Gossip: neighbours on a graph average with each other, by every engine and wherever the ranks are."""

import math

import numpy as np
import pytest
import torch

from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.algorithms.decentralized import ring_weights
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.schedule import Progress, Run
from hpcavg.algorithms.scope import Neighbours
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.engines.neighbours import mix
from hpcavg.engines.select import ENGINES
from hpcavg.errors import SickLearnersError
from tests.mpi.nodes import TRIED, Nodes
from tests.mpi.problems import PROBLEMS, values_of
from tests.oracles import gossip, synchronous

pytestmark = pytest.mark.mpi

STEPS = 40
# Rule, the oracle's matrices, steps between two means.
RULES = [
    (algorithms.gossip("ring", 1), gossip.ring, 1),
    (algorithms.gossip("ring", 3), gossip.ring, 3),
    (algorithms.gossip("exponential", 1), gossip.exponential, 1),
    (algorithms.gossip("exponential", 2), gossip.exponential, 2),
]


def engines_on(topology):
    return [name for name in ENGINES if name != "shared" or topology.num_nodes == 1]


@pytest.mark.parametrize("layout", TRIED)
@pytest.mark.parametrize(("rule", "matrices", "k"), RULES, ids=lambda value: getattr(value, "__name__", None))
def test_agrees_with_the_oracle_at_every_step(rule, matrices, k, layout, world):
    rank, size = world.Get_rank(), world.Get_size()
    topology = Nodes(world, None, layout)
    for name in engines_on(topology):
        problem = PROBLEMS["quadratic"](size)
        expected = expected_mean = None
        if rank == 0:
            local = synchronous.LocalSgd(0.02, momentum=0.9, weight_decay=0.01)
            expected, expected_mean = gossip.run(matrices(size), k, local, problem.x0, problem.gradient, STEPS)
        wait_asleep(world)
        expected, expected_mean = world.bcast((expected, expected_mean))
        module = problem.module()
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9, weight_decay=0.01)
        averager = Averager(module, optimizer, rule, topology, engine=name)
        for t in range(1, STEPS + 1):
            optimizer.zero_grad()
            problem.loss(module, rank, t).backward()
            averager.step()
            assert np.allclose(values_of(module), expected[t - 1, rank], rtol=1e-11, atol=1e-13), (name, t)
        assert averager.totals.local_averages == STEPS // k
        averager.finish()
        assert np.allclose(values_of(module), expected_mean, rtol=1e-11, atol=1e-13), name
    topology.free()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
@pytest.mark.parametrize("numel", [1, 70_001, 600_007])
def test_all_engines_give_the_same_bits(world, numel, dtype):
    """Half precision is summed in float32 and rounded once."""
    scope = Neighbours("ring", ring_weights)
    found = set()
    for layout in TRIED:
        topology = Nodes(world, None, layout)
        values = [
            torch.randn(1, numel, generator=torch.Generator().manual_seed(learner)).to(dtype)
            for learner in range(world.Get_size())
        ]
        for name in engines_on(topology):
            engine = ENGINES[name](topology, None)
            for is_in_place in (True, False):
                rows = engine.allocate(torch.zeros(1, numel, dtype=dtype))
                rows.copy_(values[topology.rank])
                out = rows if is_in_place else torch.empty_like(rows)
                engine.mix(rows, out, scope)
                found.add(out.view(torch.uint8).numpy().tobytes())
                world.Barrier()
        topology.free()
    assert len(found) == 1
    weights = gossip.ring(world.Get_size())[0][world.Get_rank()]
    exact = sum(weight * row[0].to(torch.complex128) for weight, row in zip(weights, values, strict=True))
    tolerance = 4 * torch.finfo(dtype).eps
    assert torch.allclose(out[0].to(torch.complex128), exact, rtol=tolerance, atol=tolerance)


def test_hand_worked_numbers(world):
    """Learner j holds j; after one mean on the ring it holds the mean of its three, of two learners that of both."""
    topology = Topology(world)
    size, rank = world.Get_size(), world.Get_rank()
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    averager = Averager(model, optimizer, algorithms.gossip(), topology)
    with torch.no_grad():
        model.weight.fill_(float(rank))
    model.weight.grad = torch.zeros_like(model.weight)
    averager.step()
    expected = (rank + (rank - 1) % size + (rank + 1) % size) / 3 if size > 2 else (size - 1) / 2
    assert model.weight.item() == pytest.approx(expected)
    averager.finish()
    assert model.weight.item() == pytest.approx((size - 1) / 2)
    topology.free()


def test_a_rule_may_bring_a_new_graph_to_every_mean(world):
    """Each drawn ring is a permutation of the ring. The topology drops old graphs, whose memory would add up."""
    size, rank, num_steps = world.Get_size(), world.Get_rank(), 100
    topology = Topology(world)

    def order_of(step):
        return np.random.default_rng(step).permutation(size)

    def due(progress):
        order = order_of(progress.step)
        place = np.argsort(order)
        return Neighbours(
            "drawn", lambda learner, n: {int(order[j]): weight for j, weight in ring_weights(place[learner], n).items()}
        )

    model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    averager = Averager(model, torch.optim.SGD(model.parameters(), lr=1.0), Rule(always(due)), topology)
    expected = np.arange(size) * 3.0
    with torch.no_grad():
        model.weight.fill_(expected[rank])
    for step in range(1, num_steps + 1):
        if step % 10 == 0:
            expected[0] += 1.0
        model.weight.grad = torch.full_like(model.weight, -1.0 if step % 10 == 0 and rank == 0 else 0.0)
        averager.step()
        permuted = np.eye(size)[order_of(step)]
        expected = permuted.T @ gossip.ring(size)[0] @ permuted @ expected
        assert model.weight.item() == pytest.approx(expected[rank], abs=1e-12), step
    assert len(topology._links) < num_steps
    topology.free()


@pytest.mark.parametrize("buffers", ["average", "keep"])
def test_a_sick_learner_gets_the_mean_of_its_neighbours_that_are_well(world, buffers):
    size, rank = world.Get_size(), world.Get_rank()
    topology = Topology(world)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averager = Averager(model, optimizer, algorithms.gossip(), topology, buffers=buffers)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan if rank == 0 else float(rank))
            parameter.grad = torch.zeros_like(parameter)
    if size == 1:
        with pytest.raises(Exception, match="not finite"):
            averager.finish()
    else:
        averager.step()
        neighbours = {(rank - 1) % size, rank, (rank + 1) % size}
        well = [neighbour for neighbour in neighbours if neighbour]
        assert model[0].weight[0, 0].item() == pytest.approx(sum(well) / len(well))
        assert averager.events[-1].sick == ((0,) if 0 in neighbours else ())
    topology.free()


def test_weights_that_are_not_doubly_stochastic_are_refused_on_every_rank(world):
    topology = Topology(world)
    if topology.num_learners > 1:
        star = Neighbours("star", lambda learner, num_learners: {0: 1.0})
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        averager = Averager(model, optimizer, Rule(always(lambda progress: star)), topology)
        with pytest.raises(InputError, match=r"star.*doubly stochastic: the weights of column 0 sum to 1, not"):
            averager.step()
    topology.free()


def test_links_of_a_graph(world):
    topology = Topology(world)
    size, rank = topology.num_learners, topology.rank
    scope = Neighbours("hop 1", lambda learner, n: {learner: 0.5, (learner - 1) % n: 0.5} if n > 1 else {0: 1.0})
    links = topology.links(scope)
    assert links.sources == ({} if size == 1 else {(rank - 1) % size: [(rank - 1) % size]})
    assert links.targets == ({} if size == 1 else {(rank + 1) % size: [rank]})
    assert topology.ranks_of(scope) == sorted({(rank - 1) % size, rank, (rank + 1) % size})
    own, out = torch.full((1, 3), float(rank)), torch.empty(1, 3)
    mix(own, out, topology, scope, {})
    assert (out == (rank + (rank - 1) % size) / 2).all()
    topology.free()


@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_a_run_in_which_all_learners_are_sick_stops(world, graph):
    """No learner sees all others, but none that is well can be farther away than there are learners."""
    topology = Topology(world)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averager = Averager(model, optimizer, algorithms.gossip(graph), topology)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
            parameter.grad = torch.zeros_like(parameter)
    num_met = len(topology.links(averager.algorithm.when(Run(world.Get_size()))(Progress(1))).weights[0])
    for _ in range(world.Get_size() - num_met):
        averager.step()
    with pytest.raises(SickLearnersError, match=r"not finite.*, at the neighbour average of step"):
        averager.step()
    topology.free()


@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_one_learner_that_is_well_restores_all(world, graph):
    topology = Topology(world)
    size, rank = world.Get_size(), world.Get_rank()
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    averager = Averager(model, optimizer, algorithms.gossip(graph), topology)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5.0 if rank == size - 1 else math.nan)
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(size):
        averager.step()
    assert (model.weight == 5).all()
    averager.finish()
    topology.free()
