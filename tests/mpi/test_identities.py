"""The identities between the algorithms, on drawn settings: one rule under two names takes the same steps.

Bit for bit wherever both sides do the same arithmetic; a bound of 1e-12 where they sum in another order.
"""

from types import SimpleNamespace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, Topology, algorithms
from hpcavg.algorithms.rule import Rule, always
from hpcavg.algorithms.scope import GLOBAL
from tests.mpi.problems import Logistic, Quadratic, values_of

pytestmark = pytest.mark.mpi

RATE = 0.1
periods = st.integers(1, 7)
lengths = st.integers(5, 16)
group_sizes = st.integers(1, 8)
momenta = st.sampled_from([0.0, 0.9])
shares = st.sampled_from([0.25, 0.0, 0.6])


def trajectory(comm, rule, num_steps, group_size=1, momentum=0.0, total_steps=None, problem=None):
    """Return this learner's parameters and gradients at every step, and the final mean.

    problem : logistic regression when None. group_size : wraps around at the number of learners, which it need not
        divide.
    """
    size, rank = comm.Get_size(), comm.Get_rank()
    setting = (rule.name, rule.options, num_steps, group_size, momentum)
    assert comm.bcast(setting) == setting, "the ranks drew different examples"
    problem = Logistic(size) if problem is None else problem
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=momentum)
    topology = Topology(comm, 1 + (group_size - 1) % size)
    averager = Averager(module, optimizer, rule, topology, total_steps=total_steps)
    steps, gradients = [], []
    for t in range(1, num_steps + 1):
        optimizer.zero_grad()
        loss = problem.loss(module, rank, t)
        loss.backward()
        gradients.append(module.x.grad.numpy().copy())
        averager.step(loss)
        steps.append(values_of(module))
    averager.finish()
    topology.free()
    return SimpleNamespace(steps=np.array(steps), gradients=np.array(gradients), final=values_of(module))


def assert_same(one, other):
    assert np.array_equal(one.steps, other.steps)
    assert np.array_equal(one.final, other.final)


def mean_over(comm, values):
    return comm.allreduce(values) / comm.Get_size()


# -- 1: one learner -----------------------------------------------------------------------------------------------


def by_hand(num_steps, momentum):
    """Return the parameters after every step of plain SGD."""
    problem = Logistic(1)
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=momentum)
    steps = []
    for t in range(1, num_steps + 1):
        optimizer.zero_grad()
        problem.loss(module, 0, t).backward()
        optimizer.step()
        steps.append(values_of(module))
    return np.array(steps)


@settings(max_examples=6)
@given(k=periods, extra=st.integers(0, 7), num_steps=lengths, momentum=momenta)
def test_one_learner_is_plain_sgd(world, k, extra, num_steps, momentum):
    if world.Get_rank() > 0:
        return  # it would do the same
    expected = by_hand(num_steps, momentum)
    rules = [
        algorithms.one_shot(),
        algorithms.k_avg(k),
        algorithms.hier_avg(k, k + extra),
        algorithms.pr_sgd(k),
        algorithms.pr_sgd_hetero(local_steps=[k]),
        algorithms.lupa(k),
        algorithms.ada_lupa(k, alpha=extra / 4),
        algorithms.ada_lupa(k, growth="loss"),
    ]
    for rule in rules:
        found = trajectory(MPI.COMM_SELF, rule, num_steps, momentum=momentum, total_steps=num_steps)
        assert np.array_equal(found.steps, expected), rule.name
        assert np.array_equal(found.final, expected[-1]), rule.name


@settings(max_examples=6)
@given(tau=st.integers(2, 6), extra=st.integers(0, 3), xi=shares, momentum=momenta, data=st.data())
def test_one_learner_is_not_plain_sgd_where_it_is_blended_with_its_own_past(world, tau, extra, xi, momentum, data):
    delay = data.draw(st.integers(1, tau - 1))
    if world.Get_rank() > 0:
        return
    first_merge = tau + delay
    found = trajectory(MPI.COMM_SELF, algorithms.dasgd(tau, delay, xi), first_merge + extra, momentum=momentum)
    expected = by_hand(first_merge + extra, momentum)
    assert np.array_equal(found.steps[: first_merge - 1], expected[: first_merge - 1])
    blend = xi * expected[first_merge - 1] + (1 - xi) * expected[tau - 1]  # u_t with u_{t-d}
    assert np.allclose(found.steps[first_merge - 1], blend, rtol=1e-12, atol=1e-12)
    assert not np.allclose(found.steps[first_merge - 1], expected[first_merge - 1], rtol=1e-6, atol=0)


# -- 2: hier_avg --------------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(k=periods, num_steps=lengths, group_size=group_sizes, momentum=momenta)
def test_equal_periods_make_hier_avg_k_avg(world, k, num_steps, group_size, momentum):
    assert_same(
        trajectory(world, algorithms.hier_avg(k, k), num_steps, group_size, momentum),
        trajectory(world, algorithms.k_avg(k), num_steps, momentum=momentum),
    )


@settings(max_examples=8)
@given(k1=periods, extra=st.integers(0, 7), num_steps=lengths, momentum=momenta)
def test_groups_of_one_make_hier_avg_k_avg(world, k1, extra, num_steps, momentum):
    k2 = k1 + extra
    assert_same(
        trajectory(world, algorithms.hier_avg(k1, k2), num_steps, 1, momentum),
        trajectory(world, algorithms.k_avg(k2), num_steps, momentum=momentum),
    )


@settings(max_examples=8)
@given(k1=periods, extra=st.integers(0, 7), num_steps=lengths, momentum=momenta)
def test_one_group_of_all_makes_every_mean_of_hier_avg_a_global_one(world, k1, extra, num_steps, momentum):
    k2 = k1 + extra
    found = trajectory(world, algorithms.hier_avg(k1, k2), num_steps, world.Get_size(), momentum)
    # k_avg at phases of k1 and k2, and plain k_avg(k1) where k1 divides k2.
    phases = Rule(always(lambda at: GLOBAL if at.step % k2 % k1 == 0 else None))
    expected = trajectory(world, algorithms.k_avg(k1) if k2 % k1 == 0 else phases, num_steps, momentum=momentum)
    assert np.array_equal(found.steps, expected.steps)
    # After a last local mean hier_avg takes the global one as well: of equal numbers, but a sum of three may round.
    assert np.allclose(found.final, expected.final, rtol=1e-12, atol=0)


# -- 3: a mean at every step --------------------------------------------------------------------------------------


@settings(max_examples=4)
@given(k=periods, num_steps=lengths, group_size=group_sizes, momentum=momenta)
def test_averaging_at_every_step_is_one_algorithm_by_many_names(world, k, num_steps, group_size, momentum):
    reference = trajectory(world, algorithms.sync_sgd(), num_steps, momentum=momentum)
    rules = [algorithms.k_avg(1), algorithms.hier_avg(1, 1), algorithms.lupa(1)]
    for rule in [*rules, algorithms.post_local_sgd(num_steps, k)]:
        assert_same(trajectory(world, rule, num_steps, group_size, momentum), reference)
    # The mean of the steps and the step by the mean: the same for SGD, but rounded at other places.
    by_gradients = trajectory(world, algorithms.sync_sgd("gradients"), num_steps, momentum=momentum)
    assert np.allclose(by_gradients.steps, reference.steps, rtol=1e-12, atol=1e-12)


@settings(max_examples=4)
@given(num_steps=lengths, momentum=momenta)
def test_averaging_at_every_step_equals_one_learner_with_the_whole_batch(world, num_steps, momentum):
    """P learners with batch B, one with P B, the same samples: the sums over samples are associated otherwise."""
    size = world.Get_size()
    found = trajectory(world, algorithms.sync_sgd(), num_steps, momentum=momentum)
    problem = Logistic(size)
    module = problem.module()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE, momentum=momentum)
    for t in range(1, num_steps + 1):
        index = np.concatenate([problem.batch_of(learner, t) for learner in range(size)])
        a, y = torch.tensor(problem.inputs[index]), torch.tensor(problem.labels[index])
        optimizer.zero_grad()
        nn.functional.softplus(-y * (a @ module.x)).mean().backward()
        optimizer.step()
        expected = values_of(module)
        assert np.linalg.norm(found.steps[t - 1] - expected) <= 1e-12 * np.linalg.norm(expected)


# -- 4 to 7: other names for k_avg --------------------------------------------------------------------------------

SAME_AS_K_AVG = {
    "lupa": algorithms.lupa,
    "ada_lupa without growth": lambda k: algorithms.ada_lupa(k, alpha=0),
    "dasgd that waits and takes the whole mean": lambda k: algorithms.dasgd(k, delay=0, xi=0),
    "slowmo without momentum": lambda k: algorithms.slowmo(k, beta=0, outer_lr=1),
    "diloco without momentum": lambda k: algorithms.diloco(k, outer_lr=1, outer_momentum=0),
    "post_local_sgd from the start": lambda k: algorithms.post_local_sgd(0, k),
}


@settings(max_examples=5)
@given(k=periods, num_steps=lengths, group_size=group_sizes, momentum=momenta)
def test_k_avg_by_other_names(world, k, num_steps, group_size, momentum):
    expected = trajectory(world, algorithms.k_avg(k), num_steps, momentum=momentum)
    rules = {name: make(k) for name, make in SAME_AS_K_AVG.items()}
    rules["pr_sgd_hetero with equal steps"] = algorithms.pr_sgd_hetero(local_steps=[k] * world.Get_size())
    for name, rule in rules.items():
        found = trajectory(world, rule, num_steps, group_size, momentum)
        assert np.array_equal(found.steps, expected.steps), name
        assert np.array_equal(found.final, expected.final), name


@settings(max_examples=6)
@given(num_steps=lengths, momentum=momenta)
def test_a_period_of_the_whole_run_is_one_shot(world, num_steps, momentum):
    once = trajectory(world, algorithms.one_shot(), num_steps, momentum=momentum)
    assert_same(trajectory(world, algorithms.sgd(), num_steps, momentum=momentum), once)
    whole = trajectory(world, algorithms.k_avg(num_steps), num_steps, momentum=momentum)
    assert np.array_equal(whole.steps[:-1], once.steps[:-1])
    assert np.array_equal(whole.steps[-1], once.final)
    assert np.array_equal(whole.final, once.final)


@settings(max_examples=6)
@given(tau0=periods, num_steps=lengths, momentum=momenta, by_rounds=st.booleans())
def test_ada_lupa_without_growth_is_lupa_whose_last_period_is_cut(world, tau0, num_steps, momentum, by_rounds):
    """Told the length of the run, ada_lupa takes the last mean as the last step's; lupa takes it as the final one."""
    growth = {"rounds": -(-num_steps // tau0)} if by_rounds else {"alpha": 0}
    rule = algorithms.ada_lupa(tau0, **growth)
    found = trajectory(world, rule, num_steps, momentum=momentum, total_steps=num_steps)
    expected = trajectory(world, algorithms.lupa(tau0), num_steps, momentum=momentum)
    assert np.array_equal(found.steps[:-1], expected.steps[:-1])
    assert np.array_equal(found.steps[-1], expected.final)
    assert np.array_equal(found.final, expected.final)


# -- 6: what becomes of the mean over learners --------------------------------------------------------------------


def rules_that_leave_the_mean_alone(k, extra, xi):
    return [
        algorithms.pr_sgd(k),
        algorithms.k_avg(k),
        algorithms.hier_avg(k, k + extra),
        algorithms.dasgd(k, delay=0, xi=xi),
    ]


@settings(max_examples=6)
@given(k=periods, extra=st.integers(0, 7), group_size=group_sizes, xi=shares, num_steps=lengths)
def test_the_mean_moves_by_the_mean_gradient_whatever_is_averaged(world, k, extra, group_size, xi, num_steps):
    """PR-SGD, eq. (5), for any gradients; summed in other orders."""
    for rule in rules_that_leave_the_mean_alone(k, extra, xi):
        found = trajectory(world, rule, num_steps, group_size)
        means = mean_over(world, found.steps)
        before = np.vstack([Logistic(1).x0, means[:-1]])
        expected = before - RATE * mean_over(world, found.gradients)
        assert np.allclose(means, expected, rtol=1e-12, atol=1e-12), rule.name
        assert np.allclose(means[-1], found.final, rtol=1e-12, atol=1e-12), rule.name


class SharedCurvature(Quadratic):
    """A linear gradient field in which learners differ by a constant: its mean at x_j is its value at the mean."""

    def __init__(self, num_learners):
        super().__init__(num_learners)
        self.curvature[:] = self.curvature[0]


@settings(max_examples=6)
@given(k=periods, extra=st.integers(0, 7), group_size=group_sizes, xi=shares, num_steps=lengths, momentum=momenta)
def test_on_a_linear_field_all_means_descend_alike(world, k, extra, group_size, xi, num_steps, momentum):
    problem = SharedCurvature(world.Get_size())
    x, velocity = problem.x0, 0.0
    expected = []
    for _ in range(num_steps):
        velocity = momentum * velocity + problem.curvature[0] * (x - problem.minimum.mean(axis=0))
        x = x - RATE * velocity
        expected.append(x)
    for rule in rules_that_leave_the_mean_alone(k, extra, xi):
        found = trajectory(world, rule, num_steps, group_size, momentum, problem=problem)
        # The means are sums in other orders than the reference.
        assert np.allclose(mean_over(world, found.steps), expected, rtol=1e-12, atol=1e-12), rule.name
