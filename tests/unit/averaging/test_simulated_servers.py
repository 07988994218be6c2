"""Downpour and EAMSGD in one process: the sequential definitions in the order of simulated time, and its statistics."""

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, InputError, Topology, algorithms, stack
from hpcavg.averaging.event_order import EventOrder
from hpcavg.errors import SickLearnersError
from tests.mpi.problems import Learner, Logistic, Vector, rows_of, values_of
from tests.oracles import asynchronous
from tests.oracles.synchronous import LocalAdam, LocalSgd

SGD = {"lr": 0.05}
RULES = [  # and whether the local optimizer is Adam
    ("downpour", {"n_push": 1, "n_fetch": 1}, False),
    ("downpour", {"n_push": 1, "n_fetch": 1}, True),
    ("downpour", {"n_push": 3, "n_fetch": 3}, False),
    ("downpour", {"n_push": 2, "n_fetch": 5}, False),
    ("downpour", {"n_push": 5, "n_fetch": 2}, True),
    ("eamsgd", {"tau": 2, "alpha": 0.3, "momentum": 0.0}, False),
    ("eamsgd", {"tau": 3, "alpha": None, "momentum": 0.9}, False),
]
STEPS = 30


def make(module, rule, learners, optimizer=torch.optim.SGD, settings=SGD, **options):
    topology = Topology(MPI.COMM_SELF, learners_per_rank=learners)
    stacked = stack(module, learners)
    made = optimizer(stacked.parameters(), **settings)
    return stacked, made, Averager(stacked, made, rule, topology, **options)


def train(problem, stacked, optimizer, averager, steps=None):
    """Step until the end, or so often."""
    while not averager.done and steps != 0:
        optimizer.zero_grad()
        steps_of = [progress.step for progress in averager.progress_of]
        losses = [problem.loss(Learner(stacked, row), row, step + 1) for row, step in enumerate(steps_of)]
        torch.stack(losses).sum().backward()
        averager.step()
        steps = None if steps is None else steps - 1


def in_order(learners, step_times, seed):
    order, arrivals = EventOrder(learners, step_times, seed, STEPS), []
    while order.ready:
        arrivals += [learner for learner, _ in order.compute()]
    return arrivals


@pytest.mark.parametrize("step_times", ["constant", "lognormal:0.5", "slow:3"])
@pytest.mark.parametrize("learners", [3, 8])
@pytest.mark.parametrize(("name", "given", "adam"), RULES, ids=str)
def test_it_is_the_sequential_definition_in_the_order_of_time(name, given, adam, learners, step_times):
    problem, rule = Logistic(learners), algorithms.build(name, given)
    momentum = given.get("momentum", 0.9)
    kind, settings = (torch.optim.Adam, {"lr": 0.01}) if adam else (torch.optim.SGD, {**SGD, "momentum": momentum})

    def local():
        return LocalAdam(0.01) if adam else LocalSgd(0.05, momentum, nesterov=name == "eamsgd" and momentum > 0)

    common = in_order(learners, step_times, 7), local, problem.x0, problem.gradient
    if name == "downpour":
        expected = asynchronous.downpour(*common, **given, num_learners=learners)
    else:
        alpha = given["alpha"] or 0.9 / learners
        expected = asynchronous.eamsgd(*common, tau=given["tau"], alpha=alpha, num_learners=learners)
    options = {"step_times": step_times, "seed": 7, "total_steps": STEPS}
    stacked, optimizer, averager = make(problem.module(), rule, learners, kind, settings, **options)
    train(problem, stacked, optimizer, averager)
    assert [progress.step for progress in averager.progress_of] == [STEPS] * learners
    rows = rows_of(stacked)
    assert np.linalg.norm(rows - expected[1]) <= 1e-12 * np.linalg.norm(rows)
    averager.finish()
    rows = rows_of(stacked)
    assert (rows == rows[0]).all()
    assert np.linalg.norm(rows[0] - expected[0]) <= 1e-12 * np.linalg.norm(expected[0])
    arrivals = list(averager.serve())
    assert [arrival.staleness for arrival in arrivals] == expected[2]
    times = [arrival.arrived_s for arrival in arrivals]
    assert times == sorted(times)
    periods = [period for option, period in given.items() if option in ("n_push", "n_fetch", "tau")]
    exchanges = sum(any(t % period == 0 for period in periods) for t in range(1, STEPS + 1))
    assert averager.totals.exchanges == exchanges
    assert len(averager.events) == learners * exchanges


def staleness(learners, steps, seed=0, **options):
    stacked, _, averager = make(
        Vector(np.zeros(3)), algorithms.downpour(1, 1), learners, total_steps=steps, seed=seed, **options
    )
    while not averager.done:
        stacked.module.x.grad = -torch.ones_like(stacked.module.x)
        averager.step()
    averager.finish()
    return values_of(stacked), [arrival.staleness for arrival in averager.serve()]


@pytest.mark.parametrize("step_times", ["constant", "lognormal:0.5"])
def test_an_update_sees_those_of_all_other_learners(step_times):
    """In the long run, P - 1 of them; and with steps of 1 and -1, no update is lost."""
    values, found = staleness(8, 400, step_times=step_times)
    assert len(found) == 8 * 400
    assert np.mean(found[80:-80]) == pytest.approx(7, abs=0.05)
    assert max(found) > 7
    assert np.allclose(values, 8 * 400 * SGD["lr"])


def test_a_slow_learner_is_the_stale_one():
    """Learner 3 takes as long as 5 steps of the three others: 15 updates lie between its own."""
    stacked, _, averager = make(Vector(np.zeros(1)), algorithms.downpour(1, 1), 4, step_times="slow:5", total_steps=100)
    of_slow, of_others = [], []
    while not averager.done:
        stacked.module.x.grad = torch.ones_like(stacked.module.x)
        averager.step()
        for arrival in averager.serve():
            if arrival.arrived_s < 90:
                (of_slow if arrival.learner == 3 else of_others).append(arrival.staleness)
    assert np.mean(of_slow[1:]) == pytest.approx(15, abs=1)
    assert np.mean(of_others[9:]) == pytest.approx(2.2, abs=0.1)


def test_the_same_seed_gives_the_same_bits():
    def run(seed):
        problem = Logistic(8)
        stacked, optimizer, averager = make(
            problem.module(), algorithms.eamsgd(2), 8, step_times="lognormal:0.4", seed=seed, total_steps=12
        )
        train(problem, stacked, optimizer, averager)
        averager.finish()
        return values_of(stacked).tobytes()

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_end_in_the_middle_loses_no_update():
    """Changes that are computed and not pushed yet come with the end; learner 3's step is not completed then."""
    stacked, _, averager = make(Vector(np.zeros(2)), algorithms.downpour(4, 3), 4, step_times="slow:100")
    for _ in range(10):
        stacked.module.x.grad = -torch.ones_like(stacked.module.x)
        averager.step()
    assert [progress.step for progress in averager.progress_of] == [10, 10, 10, 1]
    averager.finish()
    assert np.allclose(values_of(stacked), 31 * SGD["lr"])
    averager.finish()  # nothing more to do
    with pytest.raises(InputError, match="servers have left"):
        averager.step()


def test_no_step_after_the_last():
    stacked, _, averager = make(Vector(np.zeros(2)), algorithms.downpour(), 2, total_steps=2)
    for _ in range(2):
        stacked.module.x.grad = torch.zeros_like(stacked.module.x)
        averager.step()
    assert averager.done
    assert averager.active == []
    with pytest.raises(InputError, match="at most total_steps, 2"):
        averager.step()


@pytest.mark.parametrize("rule", [algorithms.downpour(1, 2), algorithms.eamsgd(1)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("step_times", ["constant", "lognormal:0.5"])
def test_a_sick_learner_takes_the_centre_and_sends_nothing(rule, step_times):
    problem = Logistic(3)
    stacked, optimizer, averager = make(
        problem.module(), rule, 3, settings={**SGD, "momentum": 0.9}, step_times=step_times, total_steps=8
    )
    train(problem, stacked, optimizer, averager, 3)
    list(averager.serve())
    row = averager.active[0]
    with torch.no_grad():
        stacked.module.x[row] = torch.nan
    train(problem, stacked, optimizer, averager)
    sick = [event for event in averager.events if event.sick]
    assert [event.sick for event in sick] == [(row,)]
    averager.finish()
    assert averager.totals.excluded == 1
    assert np.isfinite(values_of(stacked)).all()


def test_a_sick_learner_can_stop_the_run():
    stacked, _, averager = make(Vector(np.zeros(2)), algorithms.downpour(1, 1), 3, non_finite="stop")
    stacked.module.x.grad = torch.zeros_like(stacked.module.x)
    stacked.module.x.grad[2] = torch.inf
    with pytest.raises(SickLearnersError, match="2"):
        averager.step()


def test_the_mean_model_is_the_centre_and_then_gone():
    problem = Logistic(4)
    stacked, optimizer, averager = make(problem.module(), algorithms.downpour(1, 4), 4, step_times="lognormal:1")
    train(problem, stacked, optimizer, averager, 5)
    before = rows_of(stacked)
    with averager.mean_model():
        centre = rows_of(stacked)
    assert (centre == centre[0]).all()
    assert not np.array_equal(centre, before)
    assert np.array_equal(rows_of(stacked), before)
    with pytest.raises(InputError, match="without servers"):
        averager.state_dict()


def test_loaded_weights_become_the_centre():
    stacked, _, averager = make(Vector(np.zeros(2)), algorithms.downpour(2, 2), 3, settings={"lr": 1.0})

    def load(value):
        with torch.no_grad():
            stacked.module.x.fill_(value)

    def step():
        stacked.module.x.grad = -torch.ones_like(stacked.module.x)
        averager.step()

    load(10.0)
    step()
    step()
    with averager.mean_model():
        assert (values_of(stacked) == 16).all()
    load(100.0)
    averager.reset_anchor()
    step()
    step()
    averager.finish()
    assert (values_of(stacked) == 106).all()


def test_buffers_are_recomputed_for_all_learners():
    """Also where learners are done: none is active then."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    stacked, optimizer, averager = make(
        model, algorithms.downpour(), 3, buffers="recompute", total_steps=3, step_times="lognormal:0.5"
    )
    inputs = torch.randn(3, 16, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    while not averager.done:
        optimizer.zero_grad()
        stacked(inputs).square().sum().backward()
        averager.step()
    averager.finish([inputs])
    running = stacked.module[1].running_mean
    weight, bias = stacked.module[0].weight.detach(), stacked.module[0].bias.detach()
    means = torch.baddbmm(bias[:, None], inputs, weight.mT).mean(dim=1)
    assert torch.allclose(running, means.mean(dim=0).expand_as(running))


def test_what_does_not_go_together_is_refused():
    for rule, learners, match in (
        (algorithms.k_avg(2), 2, "step_times"),
        (algorithms.downpour(), 1, "num_servers"),
    ):
        options = {"step_times": "slow:2"} if learners > 1 else {}
        with pytest.raises(InputError, match=match):
            make(Vector(np.zeros(1)), rule, learners, **options)
