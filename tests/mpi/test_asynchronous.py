"""Downpour and EAMSGD against their sequential definitions, and that no update is lost, doubled or left over.

Servers are the last ranks. On one rank there can be none, and that is what the tests then see.
"""

import random
import time

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms, stack
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.event_order import EventOrder
from tests.mpi.problems import Logistic, Quadratic, Vector, rows_of, stacked_loss, values_of
from tests.oracles import asynchronous
from tests.oracles.synchronous import LocalSgd

pytestmark = pytest.mark.mpi


def server_counts(world, most=3):
    """Return how many servers can be tried, none on one rank."""
    return range(1, min(most, world.Get_size() - 1) + 1)


def make(world, rule, num_servers, module, **options):
    topology = Topology(world, num_servers=num_servers)
    optimizer = torch.optim.SGD(module.parameters(), **{"lr": 0.05, **options})
    return topology, optimizer, Averager(module, optimizer, rule, topology)


def take_turns(world, rule, num_servers, num_learners, arrivals, **options):
    """Let learners step in the order of `arrivals`; return the centre and every learner's parameters before the end."""
    comm = world.Split(0 if world.Get_rank() < num_learners + num_servers else MPI.UNDEFINED)
    if comm == MPI.COMM_NULL:
        return None
    problem = Quadratic(num_learners)
    module = problem.module()
    topology, optimizer, averager = make(comm, rule, num_servers, module, **options)
    own = None
    if not topology.is_server:
        for learner in arrivals:
            if topology.rank == learner:
                optimizer.zero_grad()
                problem.loss(module, learner, averager.progress.step + 1).backward()
                averager.step()
                averager._worker.flush()
            topology.learner_ranks.Barrier()
        own = values_of(module)
    staleness = [arrival.staleness for arrival in averager.serve()]
    averager.finish()
    result = values_of(module), own, staleness
    topology.free()
    comm.Free()
    return result


RULES = [
    ("downpour", {"n_push": 1, "n_fetch": 1}, {}),
    ("downpour", {"n_push": 3, "n_fetch": 3}, {"momentum": 0.9}),
    ("downpour", {"n_push": 2, "n_fetch": 5}, {}),
    ("downpour", {"n_push": 5, "n_fetch": 2}, {}),
    ("eamsgd", {"tau": 2, "alpha": 0.3, "momentum": 0.0}, {}),
    ("eamsgd", {"tau": 3, "alpha": None, "momentum": 0.9}, {}),
]


@pytest.mark.parametrize(("name", "options", "optimizer"), RULES, ids=str)
def test_the_same_arrivals_give_the_same_centre_whatever_the_servers(world, name, options, optimizer):
    """One learner, where there is no rank for more; then the arrivals are those of the sequential definition."""
    num_learners = max(1, world.Get_size() - 3)
    arrivals = np.random.default_rng(5).integers(num_learners, size=60).tolist()
    # whatever a learner has not pushed at its last multiple of n_push comes with its goodbye
    if name == "downpour":
        for learner in range(num_learners):
            arrivals += [learner] * (-arrivals.count(learner) % (options["n_push"] * options["n_fetch"]))
    problem = Quadratic(num_learners)
    common = (arrivals, lambda: LocalSgd(0.05, momentum=optimizer.get("momentum", 0.0)), problem.x0, problem.gradient)
    if name == "downpour":
        expected = asynchronous.downpour(*common, **options, num_learners=num_learners)
    else:
        momentum = options["momentum"]
        alpha = options["alpha"] or 0.9 / num_learners
        common = (arrivals, lambda: LocalSgd(0.05, momentum=momentum, nesterov=momentum > 0), *common[2:])
        expected = asynchronous.eamsgd(*common, tau=options["tau"], alpha=alpha, num_learners=num_learners)
    centres = []
    for num_servers in server_counts(world):
        rule = algorithms.build(name, options)
        result = take_turns(world, rule, num_servers, num_learners, arrivals, **optimizer)
        if result is None:
            continue
        centre, own, staleness = result
        assert np.linalg.norm(centre - expected[0]) <= 1e-12 * np.linalg.norm(expected[0])
        if own is not None:
            row = expected[1][world.Get_rank()]
            assert np.linalg.norm(own - row) <= 1e-12 * np.linalg.norm(row)
        else:
            assert staleness == expected[2]
        centres.append(centre)
    assert all(np.array_equal(centre, centres[0]) for centre in centres)


@pytest.mark.parametrize(("name", "options", "optimizer"), RULES, ids=str)
def test_simulated_servers_give_the_bits_of_real_ones(world, name, options, optimizer):
    """If real learners take turns in the order of simulated time. On one and two ranks there is one learner at most."""
    learners = world.Get_size() - 1
    if learners < 2:
        return
    topology = Topology(MPI.COMM_SELF, learners_per_rank=learners)
    problem, rule = Quadratic(learners), algorithms.build(name, options)
    stacked = stack(problem.module(), learners)
    own = torch.optim.SGD(stacked.parameters(), **{"lr": 0.05, **optimizer})
    averager = Averager(stacked, own, rule, topology, step_times="lognormal:0.5", total_steps=30, seed=3)
    order, arrivals = EventOrder(learners, "lognormal:0.5", 3, 30), []
    while not averager.done:
        own.zero_grad()
        stacked_loss(problem, stacked, range(learners), 0).sum().backward()
        averager.step()
        arrivals += [learner for learner, _ in order.compute()]
    rows = rows_of(stacked)
    averager.finish()
    topology.free()
    centre, real, staleness = take_turns(world, rule, 1, learners, arrivals, **optimizer)
    assert np.array_equal(rows_of(stacked), np.tile(centre, (learners, 1)))
    if real is not None:
        assert np.array_equal(rows[world.Get_rank()], real)
    else:
        assert [arrival.staleness for arrival in averager.serve()] == staleness


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_one_learner_of_eamsgd_is_its_sequential_definition_bit_for_bit(world, momentum):
    """And with a server alone x + c is conserved by the exchange."""
    for num_servers in server_counts(world):
        rule = algorithms.eamsgd(tau=2, alpha=0.25, momentum=momentum)
        result = take_turns(world, rule, num_servers, 1, [0] * 20)
        if result is None:
            continue
        problem = Quadratic(1)
        x, centre = torch.tensor(problem.x0), torch.tensor(problem.x0)
        parameter = nn.Parameter(x.clone())
        optimizer = torch.optim.SGD([parameter], lr=0.05, momentum=momentum, nesterov=momentum > 0)
        for t in range(1, 21):
            curvature, minimum = torch.tensor(problem.curvature[0]), torch.tensor(problem.minimum[0])
            parameter.grad = curvature * (parameter.detach() - minimum)
            optimizer.step()
            if t % 2 == 0:
                with torch.no_grad():
                    difference = (parameter - centre) * 0.25
                    before = parameter + centre
                    parameter -= difference
                    centre += difference
                    assert torch.allclose(parameter + centre, before, rtol=0, atol=1e-15)
        assert np.array_equal(result[0], centre.numpy())
        if result[1] is not None:
            assert np.array_equal(result[1], parameter.detach().numpy())


def test_one_learner_of_downpour_at_every_step_is_sgd(world):
    for num_servers in server_counts(world):
        result = take_turns(world, algorithms.downpour(1, 1), num_servers, 1, [0] * 50, momentum=0.9)
        if result is None:
            continue
        problem = Quadratic(1)
        optimizer, x = LocalSgd(0.05, momentum=0.9), problem.x0[None]
        for t in range(1, 51):
            x = optimizer.step(x, problem.gradient(x, t))
        assert np.linalg.norm(result[0] - x[0]) <= 1e-13 * np.linalg.norm(x[0])


@pytest.mark.parametrize("rule", [algorithms.downpour(1, 7), algorithms.eamsgd(1, momentum=0.0)])
def test_no_update_is_lost_or_applied_twice_and_no_message_is_left(world, rule):
    """10,000 exchanges with random pauses: what the learners stepped is in the centre, or in them and the centre."""
    exchanges = 10_000 if world.Get_size() == 4 else 1_000  # once is enough
    for num_servers in server_counts(world, most=2)[-1:]:
        num_learners = world.Get_size() - num_servers
        module = Vector(np.zeros(101))
        topology, _, averager = make(world, rule, num_servers, module, lr=1.0)
        pause = random.Random(topology.rank)
        share = [len(range(learner, exchanges, num_learners)) for learner in range(num_learners)]
        stepped, kept = np.zeros(101), np.zeros(101)
        if not topology.is_server:
            for t in range(share[topology.rank]):
                if pause.random() < 0.01:
                    time.sleep(pause.random() * 0.003)
                update = float(1 + (t + topology.rank) % 5)
                module.x.grad = torch.full((101,), -update, dtype=torch.float64)
                averager.step()
                stepped += update
            if rule.name == "eamsgd":
                kept = values_of(module)
        arrivals = list(averager.serve())
        averager.finish()
        in_centre = world.allreduce(stepped - kept)
        assert np.allclose(values_of(module), in_centre, rtol=0, atol=0 if rule.name == "downpour" else 1e-6)
        assert len(arrivals) == (exchanges if topology.is_server else 0)
        if topology.is_server:
            counts = np.bincount([arrival.learner for arrival in arrivals], minlength=num_learners)
            assert counts.tolist() == share
            assert min(arrival.staleness for arrival in arrivals) >= 0
        world.Barrier()
        assert not topology.background_comm(SERVER).Iprobe(MPI.ANY_SOURCE, MPI.ANY_TAG)
        topology.free()


def test_odd_models_are_cut_without_loss(world):
    """Several dtypes, fewer elements than servers, tied weights, a frozen layer and BatchNorm."""
    for num_servers in server_counts(world):
        torch.manual_seed(world.Get_rank())
        model = nn.Sequential(nn.Linear(3, 1), nn.BatchNorm1d(1), nn.Linear(1, 3))
        model[2].weight.requires_grad_(False)
        model.register_parameter("sixteen_bits", nn.Parameter(torch.ones(1, dtype=torch.bfloat16)))
        model.register_parameter("sixty_four_bits", nn.Parameter(torch.ones(2, dtype=torch.float64)))
        model.tied = model[0].weight
        topology, _, averager = make(world, algorithms.downpour(2, 3), num_servers, model, lr=1.0)
        if not topology.is_server:
            for step in range(5):
                for parameter in model.parameters():
                    parameter.grad = -torch.ones_like(parameter) if parameter.requires_grad else None
                with torch.no_grad():
                    model[1].running_mean.fill_(topology.rank + step)
                averager.step()
        first = [parameter.tolist() for parameter in model.parameters()]
        averager.finish()
        learners = topology.num_learners
        assert model.sixteen_bits.tolist() == [1 + 5 * learners]
        assert model.sixty_four_bits.tolist() == [1 + 5 * learners] * 2
        state = [parameter.tolist() for parameter in model.parameters()]
        assert world.bcast(state) == state
        if not topology.is_server:
            assert first != state
            assert model[1].running_mean.item() == pytest.approx((learners - 1) / 2 + 4)
        topology.free()


def test_the_mean_model_is_the_centre_and_then_gone(world):
    for num_servers in server_counts(world):
        problem = Logistic(world.Get_size())
        module = problem.module()
        topology, optimizer, averager = make(world, algorithms.downpour(1, 4), num_servers, module)
        if not topology.is_server:
            for t in range(1, 4):
                optimizer.zero_grad()
                problem.loss(module, topology.rank, t).backward()
                averager.step()
                before = values_of(module)
                with averager.mean_model() as mean:
                    centre = values_of(mean)
                    assert np.array_equal(topology.learner_ranks.bcast(centre), centre)
                    if topology.num_learners > 1:
                        assert not np.array_equal(centre, before)
                assert np.array_equal(values_of(module), before)
            assert averager.totals.exchanges == 3
        staleness = [arrival.staleness for arrival in averager.serve()]
        averager.finish()
        averager.finish()  # nothing more to do
        with pytest.raises(InputError, match="without servers"):
            averager.state_dict()
        if not topology.is_server:
            with pytest.raises(InputError, match="servers have left"):
                averager.step()
        assert len(staleness) == (3 * topology.num_learners if topology.is_server else 0)
        topology.free()


def test_what_does_not_go_together_is_refused_on_every_rank(world):
    module = Vector(np.zeros(1))
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    with pytest.raises(InputError, match="some must learn"):
        Topology(world, num_servers=world.Get_size())
    topology = Topology(world)
    with pytest.raises(InputError, match="at least 1"):
        Averager(module, optimizer, algorithms.downpour(), topology)
    topology.free()
    for num_servers in server_counts(world)[-1:]:
        topology = Topology(world, num_servers=num_servers)
        with pytest.raises(InputError, match="no use for servers"):
            Averager(module, optimizer, algorithms.k_avg(), topology)
        with pytest.raises(InputError, match="no global means"):
            Averager(module, optimizer, algorithms.downpour(), topology, optimizer_state="reset")
        with pytest.raises(InputError, match=r"torch\.optim\.SGD"):
            Averager(module, torch.optim.Adam(module.parameters()), algorithms.eamsgd(), topology)
        averager = Averager(module, optimizer, algorithms.downpour(), topology)
        if topology.is_server:
            assert averager.done
            with pytest.raises(InputError, match="servers take no steps"):
                averager.step()
        averager.finish()
        topology.free()
