"""The order of completions in simulated time: by hand, and against one learner at a time."""

import json

import numpy as np
import pytest

from hpcavg import AveragingOptions, InputError
from hpcavg.averaging.event_order import EventOrder


def rounds(order, number):
    """Compute so many times; return the learners that were ready, and what was completed by time, without the ties."""
    found = []
    for _ in range(number):
        ready, by_time = order.ready, {}
        for learner, time in order.compute():
            by_time.setdefault(time, set()).add(learner)
        found.append((ready, by_time))
    return found


def test_constant_times_keep_all_learners_together():
    all_of = {0, 1, 2}
    assert rounds(EventOrder(3), 3) == [([0, 1, 2], {float(step): all_of}) for step in (1, 2, 3)]


def test_one_slow_learner_by_hand():
    """It takes 2.75; the others 1. A learner is computed as soon as its next completion may be the first."""
    assert rounds(EventOrder(3, "slow:2.75"), 5) == [
        ([0, 1, 2], {1.0: {0, 1}}),
        ([0, 1], {2.0: {0, 1}, 2.75: {2}}),
        ([0, 1, 2], {3.0: {0, 1}}),
        ([0, 1], {4.0: {0, 1}}),
        ([0, 1], {5.0: {0, 1}, 5.5: {2}}),
    ]


def test_ties_are_drawn_and_not_by_number():
    first = [tuple(learner for learner, _ in EventOrder(8, seed=seed).compute()) for seed in range(50)]
    assert len(set(first)) > 40
    assert len({order[0] for order in first}) == 8
    order = EventOrder(8)
    assert len({tuple(learner for learner, _ in order.compute()) for _ in range(50)}) > 40  # anew at every step


@pytest.mark.parametrize("step_times", ["constant", "lognormal:0.5", "slow:3.7"])
def test_the_order_is_that_of_time_and_each_learner_takes_all_steps(step_times):
    order = EventOrder(5, step_times, seed=3, total_steps=40)
    completed, computed = [], np.zeros(5, int)
    while order.ready:
        computed[order.ready] += 1
        completed += order.compute()
        done = np.bincount([learner for learner, _ in completed], minlength=5)
        assert ((computed == done) | (computed == done + 1)).all()
    times = [time for _, time in completed]
    assert times == sorted(times)
    assert computed.tolist() == [40] * 5
    assert order.drain() == []


def test_lognormal_steps_have_the_mean_1():
    order = EventOrder(4, "lognormal:0.8", total_steps=5000)
    ends = {}
    while order.ready:
        ends.update(order.compute())
    assert np.allclose(list(ends.values()), 5000, rtol=0.05)


def test_drain_completes_what_is_computed():
    order = EventOrder(3, "slow:2.5")
    order.compute()
    assert order.drain() == [(2, 2.5)]
    assert order.ready == []


def test_the_state_goes_on_as_if_never_saved():
    one, other = (EventOrder(6, "lognormal:0.3", seed=seed) for seed in (1, 2))
    for _ in range(7):
        one.compute()
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(20):
        assert one.ready == other.ready
        assert one.compute() == other.compute()


@pytest.mark.parametrize(
    "value", ["", "fixed", "constant:1", "lognormal", "lognormal:0", "slow:0.5", "slow:nan", "slow:x"]
)
def test_other_step_times_are_refused_by_name(value):
    with pytest.raises(InputError, match="step_times"):
        AveragingOptions(step_times=value)
