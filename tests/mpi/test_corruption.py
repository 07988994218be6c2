"""A bit that flips where all learners must hold the same is found at the next check, and the odd one named."""

import numpy as np
import pytest
import torch
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms
from hpcavg.averaging import health
from hpcavg.errors import CorruptionError
from tests.mpi.nodes import Nodes
from tests.mpi.problems import values_of

pytestmark = pytest.mark.mpi

ROUNDS = 2  # checks are at steps 4, 8, 12, ... with a global mean every second step


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 1))
    model[2].requires_grad_(False)
    return model


def flip_bit(tensor, index=1, bit=20):
    flat = tensor.detach().view(-1).view(torch.int32)
    flat[index] ^= 1 << bit


def train(world, rule, num_steps, before_step=lambda averager, step: None, topology=None, **options):
    """Train on inputs that differ by learner; return the averager and the error that ended it, if any."""
    topology = topology or Topology(world, min(2, world.Get_size()))
    model = network()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    averager = Averager(model, optimizer, rule, topology, **{"check_rounds": ROUNDS, **options})
    torch.manual_seed(100 + world.Get_rank())
    error = None
    try:
        for step in range(1, num_steps + 1):
            before_step(averager, step)
            optimizer.zero_grad()
            model(torch.randn(6, 4)).square().mean().backward()
            averager.step(torch.ones(()))
        averager.finish()
    except CorruptionError as raised:
        error = raised
    topology.free()
    return averager, error


def assert_found(world, averager, error, step, odd, what):
    """On three ranks and more the odd one is named; two can only say that they differ."""
    size = world.Get_size()
    if size == 1:
        assert error is None
        return
    assert averager.progress.step == step
    text = str(error)
    assert text.count("\n") == 0
    assert text.endswith(f"at step {step}" if size > 2 else "; which of them are damaged cannot be told")
    assert what in text
    assert error.ranks == ([odd] if size > 2 else [])
    assert text.startswith(f"learner {odd} with other" if size > 2 else "learners 0, 1 with different")


RULES = [
    algorithms.sync_sgd(),
    algorithms.sync_sgd("gradients"),
    algorithms.k_avg(2),
    algorithms.hier_avg(1, 2),
    algorithms.pr_sgd(2),
    algorithms.post_local_sgd(4, 2),
    algorithms.lupa(2),
    algorithms.ada_lupa(2),
    algorithms.ada_lupa(2, growth="loss"),
    algorithms.dasgd(2, 1, 0.25),
    algorithms.dasgd(2, 1, 0.0),
    algorithms.slowmo(2),
    algorithms.diloco(2),
    algorithms.one_shot(),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.name}-{rule.options}")
def test_nothing_is_found_where_nothing_is_wrong(world, rule):
    for options in ({}, {"buffers": "keep", "check_rounds": 1}):
        _, error = train(world, rule, 12, **options)
        assert error is None


def test_a_bit_of_a_mean_that_was_just_written(world):
    odd = world.Get_size() - 1
    counted = []

    def damage(averager, step):
        if step != 1:
            return
        learner, take = averager._learner, averager._learner.take

        def damaged_take(arrays, *arguments, **options):
            means = take(arrays, *arguments, **options)
            counted.extend(means)
            if means and world.Get_rank() == odd and len(counted) == 3:  # parameters, buffers; parameters
                flip_bit(means[0], index=3)
            return means

        learner.take = damaged_take

    averager, error = train(world, algorithms.k_avg(2), 12, damage)
    assert_found(world, averager, error, 4, odd, "parameters")


@pytest.mark.parametrize("kind", ["anchor", "momentum"])
@pytest.mark.parametrize("rule", [algorithms.slowmo(2), algorithms.diloco(2)], ids=lambda rule: rule.name)
def test_a_bit_of_the_outer_state(world, rule, kind):
    def damage(averager, step):
        if step == 6 and world.Get_rank() == 0:
            flip_bit(averager._learner.outer.states[0][kind])

    averager, error = train(world, rule, 12, damage)
    assert_found(world, averager, error, 8, 0, "outer state")


@pytest.mark.parametrize("rule", [algorithms.k_avg(2), algorithms.pr_sgd(2), algorithms.dasgd(2, 1, 0.25)], ids=str)
def test_a_bit_of_a_frozen_parameter(world, rule):
    """Whatever the rule: also where learners never agree on the others."""
    odd = world.Get_size() // 2

    def damage(averager, step):
        if step == 7 and world.Get_rank() == odd:
            flip_bit(averager.model[2].weight)

    averager, error = train(world, rule, 12, damage)
    assert_found(world, averager, error, 9 if rule.delay_steps else 8, odd, "frozen parameters")


def test_a_bit_of_a_parameter_that_gradients_are_averaged_for(world):
    """Every step is a round: the parameters that step 5 leaves are compared before the gradients of step 6 meet."""
    odd = world.Get_size() - 1

    def damage(averager, step):
        if step == 5 and world.Get_rank() == odd:
            flip_bit(averager.model[0].weight)

    averager, error = train(world, algorithms.sync_sgd("gradients"), 12, damage)
    assert_found(world, averager, error, 6, odd, "parameters")


def test_the_final_mean_is_compared_whatever_the_rounds(world):
    def damage(averager, step):
        if step == 7 and world.Get_rank() == 0:
            flip_bit(averager.model[2].weight)

    averager, error = train(world, algorithms.one_shot(), 7, damage, check_rounds=1000)
    assert_found(world, averager, error, 7, 0, "frozen parameters")


def test_a_bit_that_flips_between_two_means_is_averaged_in(world):
    def damage(averager, step):
        if step == 3 and world.Get_rank() == 0:
            flip_bit(averager.model[0].weight)

    _, error = train(world, algorithms.k_avg(2), 8, damage)
    assert error is None


@pytest.mark.parametrize("layout", ["nodes of 2", "nodes of 1"])
def test_learners_on_several_nodes_hold_the_same_bits(world, layout):
    for options in ({"engine": "twolevel"}, {"engine": "mpi"}, {"engine": "twolevel", "wire_dtype": "bfloat16"}):
        topology = Nodes(world, min(2, world.Get_size()), layout)
        _, error = train(world, algorithms.k_avg(2), 8, topology=topology, **options)
        assert error is None


def test_a_sick_learner_that_got_the_mean_holds_what_the_others_do(world):
    def fall_sick(averager, step):
        if step == 4 and world.Get_rank() == 0 and world.Get_size() > 1:
            with torch.no_grad():
                averager.model[0].weight[0, 0] = float("nan")

    averager, error = train(world, algorithms.slowmo(2), 12, fall_sick)
    assert error is None
    assert averager.totals.excluded == (world.Get_size() > 1)
    assert np.isfinite(values_of(averager.model)).all()


def test_who_is_odd(world):
    """Learners hold what the lists say; expected is the odd ones, None where it cannot be told."""
    rank, size = world.Get_rank(), world.Get_size()
    topology = Topology(world)
    cases = [([0] * 8, []), ([0] * (size - 1) + [1], [size - 1] if size > 2 else None), (list(range(8)), None)]
    if size == 4:
        cases += [([0, 0, 1, 1], None), ([2, 0, 0, 1], [0, 3])]
    for held, odd in cases:
        parts = {"parameters": [torch.tensor(held[rank])], "outer state": [torch.zeros(0), torch.ones(2)]}
        if size == 1 or odd == []:
            health.compare(parts, topology, "at step 1")
            continue
        with pytest.raises(CorruptionError, match="parameters") as raised:
            health.compare(parts, topology, "at step 1")
        assert raised.value.ranks == (odd or [])
        assert ("cannot be told" in str(raised.value)) == (odd is None)
        assert "outer" not in str(raised.value)
    topology.free()


def test_there_is_nothing_to_compare_where_servers_hold_the_parameters(world):
    if world.Get_size() > 1:
        topology = Topology(world, num_servers=1)
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(InputError, match="check_rounds"):
            Averager(model, optimizer, algorithms.downpour(), topology, check_rounds=1)
        topology.free()
