"""What learners start from: rank 0's parameters, weights that are loaded later, their own; and rates that differ."""

import pytest
import torch
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms

pytestmark = pytest.mark.mpi

RULES = {
    "k_avg": {"k": 2},
    "hier_avg": {"k1": 1, "k2": 2},
    "dasgd": {"tau": 2, "delay": 1},
    "slowmo": {"k": 2},
    "diloco": {"h": 2},
    "downpour": {"n_push": 2, "n_fetch": 2},
    "eamsgd": {"tau": 2},
}
SERVED = ("downpour", "eamsgd")


def make(world, name, learning_rate=1e-9, **options):
    topology = Topology(world, num_servers=int(name in SERVED))
    torch.manual_seed(world.Get_rank())
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=learning_rate)
    return Averager(model, optimizer, algorithms.build(name, RULES[name]), topology, total_steps=8, **options)


def load(model, value):
    model.load_state_dict({"weight": torch.full((4, 4), value), "bias": torch.full((4,), value)})


def train(averager, steps=8):
    for _ in range(0 if averager.topology.is_server else steps):
        averager.optimizer.zero_grad()
        averager.model(torch.ones(2, 4)).square().mean().backward()
        averager.step()


def weights(averager):
    return averager.model.weight.detach()


@pytest.mark.parametrize("name", RULES)
def test_weights_loaded_before_the_first_step_are_where_all_starts(world, name):
    """At a rate of 1e-9 nothing changes: the final model is what was loaded."""
    if name in SERVED and world.Get_size() == 1:
        return
    averager = make(world, name)
    load(averager.model, 5.0)
    train(averager)
    averager.finish()
    assert torch.allclose(weights(averager), torch.tensor(5.0), atol=1e-5)
    averager.topology.free()


@pytest.mark.parametrize("name", RULES)
def test_weights_loaded_later_are_gone_on_from_after_reset_anchor(world, name):
    if name in SERVED and world.Get_size() == 1:
        return
    averager = make(world, name)
    train(averager, 3)  # with a mean in flight, of dasgd
    load(averager.model, 5.0)
    averager.reset_anchor()
    train(averager, 5)
    averager.finish()
    assert torch.allclose(weights(averager), torch.tensor(5.0), atol=1e-5)
    averager.topology.free()


@pytest.mark.parametrize(("name", "before"), [("slowmo", 0), ("slowmo", 2), ("diloco", 3)])
def test_weights_loaded_on_one_rank_alone_are_refused(world, name, before):
    if world.Get_size() == 1:
        return
    averager = make(world, name)
    train(averager, before)
    if world.Get_rank() == 0:
        load(averager.model, 5.0)
    with pytest.raises(InputError, match=r"other parameters on ranks? 1"):
        averager.reset_anchor() if before else train(averager, 2)
    averager.topology.free()


@pytest.mark.parametrize("name", ["k_avg", "slowmo"])
def test_a_model_restored_before_the_averager_is_made_keeps_its_own_values(world, name):
    """As Lightning does: each learner loads its own state, and only then the averager is made."""
    first = make(world, name, learning_rate=0.1)
    torch.manual_seed(7 + world.Get_rank())
    for _ in range(3):  # one after a mean: learners differ
        first.optimizer.zero_grad()
        first.model(torch.randn(2, 4)).square().mean().backward()
        first.step()
    saved = {name: value.clone() for name, value in first.model.state_dict().items()}, first.state_dict()
    first.topology.free()
    model = nn.Linear(4, 4)
    model.load_state_dict(saved[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = algorithms.build(name, RULES[name])
    second = Averager(model, optimizer, rule, Topology(world), total_steps=8, start="own")
    second.load_state_dict(saved[1])
    assert torch.equal(model.weight, saved[0]["weight"])
    train(second, 1)
    train(first_again := _resumed_later(world, name, saved), 1)
    assert torch.equal(weights(second), weights(first_again))
    for averager in (second, first_again):
        averager.topology.free()


def _resumed_later(world, name, saved):
    """Return the averager of a run that was resumed the other way round: made first, loaded then."""
    averager = make(world, name, learning_rate=0.1)
    averager.model.load_state_dict(saved[0])
    averager.load_state_dict(saved[1])
    return averager


def test_learners_with_their_own_anchors_are_refused(world):
    """Own models without the state of the averager: an anchor each, where there must be one."""
    if world.Get_size() > 1:
        averager = make(world, "slowmo", start="own")
        with pytest.raises(InputError, match=r"other parameters on ranks? 1"):
            train(averager, 2)
        averager.topology.free()


@pytest.mark.parametrize("name", ["slowmo", "diloco", "k_avg"])
def test_learning_rates_that_differ_by_rank_lead_to_one_model(world, name):
    """As ReduceLROnPlateau on each learner's own loss makes them."""
    averager = make(world, name, learning_rate=0.1)
    torch.manual_seed(20 + world.Get_rank())
    for step in range(8):
        averager.optimizer.param_groups[0]["lr"] = 0.1 / (1 + step * world.Get_rank())
        averager.optimizer.zero_grad()
        averager.model(torch.randn(2, 4)).square().mean().backward()
        averager.step()
    averager.finish()
    own = weights(averager).tolist()
    assert world.bcast(own) == own
    averager.topology.free()


def test_slowmo_follows_the_mean_of_the_rates(world):
    """Worked by hand: the slow momentum is scaled by the mean rate, the same on all learners.

    Rates r_j = 1 + j with mean r, gradient -1: after K = 1 step the mean moved by r, so Δ = -r and v = Δ; x = r. Then
    rates are halved: v = v/2 · β + Δ with β = 1/2 and Δ = -r/2: v = -3r/4, x = r + 3r/4.
    """
    topology = Topology(world)
    model = nn.Module()
    model.x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0 + world.Get_rank())
    averager = Averager(model, optimizer, algorithms.slowmo(1, beta=0.5, outer_lr=1.0), topology)
    mean_rate = (world.Get_size() + 1) / 2
    found = []
    for _ in range(2):
        model.x.grad = torch.full((1,), -1.0, dtype=torch.float64)
        averager.step()
        found.append(model.x.item())
        optimizer.param_groups[0]["lr"] /= 2
    assert found == pytest.approx([mean_rate, mean_rate * 1.75], rel=1e-12)
    topology.free()


def test_servers_serve_one_averager_at_a_time(world):
    """Two would take each other's messages for their own; one after the other has finished may follow."""
    if world.Get_size() == 1:
        return
    first = make(world, "downpour")
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(InputError, match="serve another Averager"):
        Averager(model, optimizer, algorithms.eamsgd(2), first.topology)
    train(first)
    first.finish()
    second = Averager(model, optimizer, algorithms.downpour(1, 1), first.topology, total_steps=1)
    if not first.topology.is_server:
        model(torch.ones(1, 2)).sum().backward()
        second.step()
    second.finish()
    values = model.weight.tolist()
    assert world.bcast(values) == values
    first.topology.free()
