"""Which mean is due at which step: hand-worked lists."""

import pytest

from hpcavg import algorithms
from hpcavg.errors import InputError
from hpcavg.schedule import Progress, Scope, every, hierarchical, never, switch

L, G = Scope.LOCAL, Scope.GLOBAL


def dues(schedule, num_steps):
    return [schedule(Progress(step=t)) for t in range(1, num_steps + 1)]


def test_every_third_step():
    assert dues(every(3), 7) == [None, None, G, None, None, G, None]


def test_every_step_and_never():
    assert dues(every(1), 3) == [G, G, G]
    assert dues(never, 3) == [None, None, None]


def test_hierarchical_where_k1_divides_k2():
    # phases: 1 2 3 4 5 0 | 1 2 ...
    assert dues(hierarchical(2, 6), 8) == [None, L, None, L, None, G, None, L]


def test_hierarchical_where_k1_does_not_divide_k2():
    # Hier-AVG's ImageNet run in small: K1 = 2, K2 = 5; the phase restarts, so step 7 is phase 2
    assert dues(hierarchical(2, 5), 10) == [None, L, None, L, G, None, L, None, L, G]


def test_hierarchical_at_the_imagenet_setting():
    found = dues(hierarchical(20, 43), 86)
    assert [t for t, due in enumerate(found, 1) if due is L] == [20, 40, 63, 83]
    assert [t for t, due in enumerate(found, 1) if due is G] == [43, 86]


def test_hierarchical_with_equal_periods_is_k_avg():
    assert dues(hierarchical(4, 4), 40) == dues(every(4), 40)


def test_switch_counts_steps_from_the_start_of_the_run():
    assert dues(switch(2, every(1), every(3)), 9) == [G, G, G, None, None, G, None, None, G]
    assert dues(switch(0, every(1), every(3)), 6) == dues(every(3), 6)


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: algorithms.k_avg(0), "k"),
        (lambda: algorithms.k_avg(2.0), "k"),
        (lambda: algorithms.k_avg(True), "k"),
        (lambda: algorithms.hier_avg(0, 4), "k1"),
        (lambda: algorithms.hier_avg(5, 4), "k1"),
        (lambda: algorithms.hier_avg(1, 0), "k2"),
        (lambda: algorithms.pr_sgd(0), "interval"),
        (lambda: algorithms.post_local_sgd(-1, 4), "switch_step"),
        (lambda: algorithms.sync_sgd("both"), "variant"),
        (lambda: algorithms.build("k_avg", {"k1": 3}), "k1"),
        (lambda: algorithms.build("sgd", {"k": 3}), "k"),
    ],
)
def test_unusable_arguments_are_refused_by_name(make, option):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.option == option


def test_algorithms_are_named_as_their_constructors():
    for name in algorithms.ALGORITHMS:
        assert algorithms.build(name, {}).name == name
