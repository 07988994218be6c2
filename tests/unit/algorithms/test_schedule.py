"""Which mean is due at which step, and at which learning rate: hand-worked lists."""

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
from hypothesis import given

from hpcavg import algorithms
from hpcavg.algorithms.schedule import Progress, Run, every, hierarchical, in_seconds, never, restart_length
from hpcavg.algorithms.scope import GLOBAL, LOCAL
from hpcavg.errors import InputError

L, G = LOCAL, GLOBAL


def dues(schedule, num_steps):
    return [schedule(Progress(step=t)) for t in range(1, num_steps + 1)]


def periods(rule, num_steps, run=None, losses=None):
    """Return the steps from each global mean to the next, as an averager would take them.

    run : one learner that knows its length when None. losses : the training loss of every round.
    """
    due = rule.when(Run(total_steps=num_steps) if run is None else run)
    progress, found = Progress(), []
    for _ in range(num_steps):
        progress.step += 1
        if due(progress) is G:
            found.append(progress.step - progress.round_step)
            if losses is not None:
                progress.loss = losses[progress.round]
                progress.first_loss = losses[0]
            progress.round += 1
            progress.round_step = progress.step
    return found


def rates(rule, run, num_steps, first_rate=0.1):
    """Return the learning rate of every step."""
    due, rate = rule.when(run), rule.rate(run)
    progress, found = Progress(), []
    for _ in range(num_steps):
        progress.step += 1
        found.append(rate(progress, first_rate))
        if due(progress) is G:
            progress.round += 1
            progress.round_step = progress.step
    return found


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


@pytest.mark.parametrize(
    ("switch_step", "k", "num_steps", "expected"),
    [
        (0, 3, 8, [3, 3]),
        (2, 3, 9, [1, 1, 3, 3]),  # at 2 + 3 and 2 + 6, which 3 does not divide
        (3, 2, 8, [1, 1, 1, 2, 2]),
        (4, 4, 12, [1, 1, 1, 1, 4, 4]),
        (5, 1, 7, [1, 1, 1, 1, 1, 1, 1]),
        (9, 4, 6, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_post_local_sgd_counts_its_periods_from_the_switch(switch_step, k, num_steps, expected):
    assert periods(algorithms.post_local_sgd(switch_step, k), num_steps) == expected


# -- LUPA-SGD -----------------------------------------------------------------------------------------------------


def test_lupa_is_k_avg():
    assert periods(algorithms.lupa(3), 8) == [3, 3]


@pytest.mark.parametrize(
    ("num_learners", "batch_size", "total_steps", "tau"),
    [
        (5, 128, 21875, 91),  # LUPA-SGD, section 6: 782.2 / 8.62 = 90.8
        (1, 8, 1000, 50),  # 100 / 2
        (4, 16, 8000, 100),  # 400 / 4
        (64, 64, 1, 1),  # 1/16, and no period is shorter than a step
    ],
)
def test_lupas_automatic_period_follows_the_run(num_learners, batch_size, total_steps, tau):
    run = Run(num_learners, 0, total_steps, batch_size)
    assert periods(algorithms.lupa("auto"), 2 * tau, run) == [tau, tau]


@pytest.mark.parametrize(
    ("tau0", "alpha", "num_steps", "expected"),
    [
        (3, 0.25, 20, [3, 4, 5, 6, 2]),  # 3, 3.75, 4.5, 5.25, and 2 of 6
        (10, 1.1, 120, [10, 21, 32, 43, 14]),  # alpha tau0 = 11 exactly: no 22 from the binary 1.1
        (8, None, 56, [8, 12, 16, 20]),  # alpha = 0.5
        (4, 0, 10, [4, 4, 2]),
        (4, 0.1, 17, [4, 5, 5, 3]),  # 4.4, 4.8, and 3 of 5.2
        (5, 2, 3, [3]),
    ],
)
def test_adaptive_periods_grow_linearly_and_the_last_is_cut(tau0, alpha, num_steps, expected):
    assert periods(algorithms.ada_lupa(tau0, alpha=alpha), num_steps) == expected


def test_adaptive_periods_of_a_run_of_unknown_length_are_not_cut():
    assert periods(algorithms.ada_lupa(3, alpha=0.25), 20, Run()) == [3, 4, 5, 6]


@pytest.mark.parametrize(
    ("tau0", "rounds", "num_steps", "expected"),
    [
        (4, 4, 30, [4, 7, 8, 11]),  # 16 + 24 alpha = 30; ends 4, 10.33, 19, 30
        (5, 3, 15, [5, 5, 5]),  # alpha = 0
        (5, 3, 13, [5, 5, 3]),  # even alpha = 0 overfills the run
        (2, 2, 100, [2, 98]),  # 4 + 2 alpha = 100
        (8, 1, 5, [5]),
    ],
)
def test_a_given_number_of_adaptive_periods_fills_the_run(tau0, rounds, num_steps, expected):
    assert periods(algorithms.ada_lupa(tau0, rounds=rounds), num_steps) == expected


def test_ten_adaptive_periods_fill_the_papers_run():
    """LUPA-SGD's T = 21875 and tau0 = 91: 910 + 4095 alpha = 21875, so alpha = 5.12."""
    found = periods(algorithms.ada_lupa(91, rounds=10), 21875)
    exact = [91 * (1 + i * Fraction(20965, 4095)) for i in range(10)]
    assert sum(found) == 21875
    assert all(abs(steps - real) < 1 for steps, real in zip(found, exact, strict=True))


@pytest.mark.parametrize(
    ("losses", "num_steps", "expected"),
    [
        # F_0/F_i = 1, 8, 8/0.9 = 8.9, 27 exactly: cube roots 1, 2, 2.07, 3, rounded up
        ([8.0, 1.0, 0.9, 8 / 27, 1.0], 10 + 10 + 20 + 30 + 30, [10, 10, 20, 30, 30]),
        ([1.0, 2.0, 0.5, 2.0], 50, [10, 10, 10, 20]),  # a rising loss does not shrink it; 2 ** (1/3) rounded up
        ([1.0, 0.5, 1.0], 33, [10, 10, 13]),  # 20, cut
        ([0.0, 1.0, 1.0], 30, [10, 10, 10]),
        ([1.0, 0.0, -1.0], 30, [10, 10, 10]),
        ([math.nan, 1.0, math.inf], 30, [10, 10, 10]),
    ],
)
def test_periods_follow_the_loss(losses, num_steps, expected):
    rule = algorithms.ada_lupa(10, growth="loss")
    assert rule.agrees_on == "loss"
    assert periods(rule, num_steps, losses=losses) == expected


@given(tau0=st.integers(1, 20), hundredths=st.integers(0, 300), num_steps=st.integers(1, 200))
def test_adaptive_periods_sum_to_the_run_whatever_their_growth(tau0, hundredths, num_steps):
    found = periods(algorithms.ada_lupa(tau0, alpha=hundredths / 100), num_steps)
    uncut = [math.ceil((1 + i * Fraction(hundredths, 100)) * tau0) for i in range(len(found))]
    assert sum(found) == num_steps
    assert found[:-1] == uncut[:-1]
    assert 1 <= found[-1] <= uncut[-1]


@given(tau0=st.integers(1, 20), num_steps=st.integers(1, 200), data=st.data())
def test_exactly_so_many_adaptive_periods_sum_to_the_run(tau0, num_steps, data):
    most = -(-num_steps // tau0)
    rounds = data.draw(st.integers(min(2, most), most))
    found = periods(algorithms.ada_lupa(tau0, rounds=rounds), num_steps)
    assert len(found) == rounds
    assert sum(found) == num_steps
    assert min(found) >= 1
    if num_steps >= rounds * tau0:  # (1 + i alpha) tau0 with the exact alpha; rounding moves each by less than a step
        growth = Fraction(2 * (num_steps - rounds * tau0), max(1, rounds * (rounds - 1)))
        assert all(abs(steps - tau0 - i * growth) < 1 for i, steps in enumerate(found))


@given(ratios=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8), tau0=st.integers(1, 9), extra=st.integers(0, 99))
def test_periods_that_follow_the_loss_sum_to_the_run(ratios, tau0, extra):
    num_steps = len(ratios) + extra
    found = periods(algorithms.ada_lupa(tau0, growth="loss"), num_steps, losses=[1.0] + (ratios * num_steps))
    assert sum(found) == num_steps
    assert min([*found[:-1], tau0]) == tau0
    assert found[-1] >= 1


def test_the_rate_of_lupa_falls_with_time():
    """4 / (mu (t + a)) with a = tau + 4 = 7 and t = 0 at the first step, whatever rate the optimizer was given."""
    run = Run(total_steps=9)
    assert rates(algorithms.lupa(3, mu=0.5), run, 4) == pytest.approx([8 / 7, 1.0, 8 / 9, 0.8])
    assert rates(algorithms.lupa(3, mu=2.0, shift=20.0), Run(), 3) == pytest.approx([2 / 20, 2 / 21, 2 / 22])
    assert algorithms.lupa(3).rate is None


def test_the_rate_of_ada_lupa_is_shifted_by_the_longest_period():
    run = Run(total_steps=30)  # periods 4, 7, 8, 11
    assert rates(algorithms.ada_lupa(4, rounds=4, mu=1.0), run, 2) == pytest.approx([4 / 15, 4 / 16])
    assert rates(algorithms.ada_lupa(4, growth="loss", mu=1.0, shift=10.0), run, 2) == pytest.approx([4 / 10, 4 / 11])


def test_the_rate_of_lupa_follows_the_automatic_period():
    run = Run(1, 0, 1000, 8)  # tau = 50
    assert rates(algorithms.lupa("auto", mu=1.0), run, 1) == pytest.approx([4 / 54])


# -- PR-SGD -------------------------------------------------------------------------------------------------------


def test_restarted_epochs_grow_as_the_cube_root():
    # One learner: epoch 1 of 1 step, epochs 2 to 8 of 2, 9 to 27 of 3, 28 to 64 of 4; the cubes end their lengths.
    rule = algorithms.pr_sgd_time_varying()
    expected = [1] + [2] * 7 + [3] * 19 + [4] * 37 + [5]
    assert periods(rule, sum(expected), Run(1)) == expected
    # Two learners: half of it, rounded up.
    expected = [1] * 8 + [2] * 56 + [3]
    assert periods(rule, sum(expected), Run(2)) == expected


@pytest.mark.parametrize("num_learners", [1, 2, 3, 7])
@pytest.mark.parametrize("root", [1, 2, 5, 10, 1000, 10**5])
def test_an_exact_cube_is_not_rounded_up(num_learners, root):
    length = restart_length(num_learners)
    epoch = (root * num_learners) ** 3
    assert length(Progress(round=epoch - 1)) == root
    assert length(Progress(round=epoch)) == root + 1


def test_the_rate_of_restarted_epochs():
    """gamma_0 N / s^(2/3), the same in all steps of epoch s."""
    rule = algorithms.pr_sgd_time_varying()
    assert rates(rule, Run(1), 4) == pytest.approx([0.1] + [0.1 / 2 ** (2 / 3)] * 2 + [0.1 / 3 ** (2 / 3)])
    found = rates(rule, Run(2), 12)  # eight epochs of 1 step, then 2
    assert found[0] == pytest.approx(0.2)
    assert found[7] == pytest.approx(0.2 / 4)
    assert found[8] == found[9] == pytest.approx(0.2 / 9 ** (2 / 3))
    assert found[10] == pytest.approx(0.2 / 10 ** (2 / 3))


def test_learners_take_the_steps_of_their_own():
    rule = algorithms.pr_sgd_hetero(local_steps=[2, 5, 3])
    assert [periods(rule, 10, Run(3, learner)) for learner in range(3)] == [[2] * 5, [5] * 2, [3] * 3]
    assert rule.own_pace


def test_automatic_local_steps_are_proportional_to_the_speed():
    due = algorithms.pr_sgd_hetero(local_steps="auto", base_steps=5).when(Run(2))
    for speed, steps in ((1.0, 5), (1.6, 8), (2.0, 10), (3.3, 16)):  # 16.5 to the even
        at = [due(Progress(step=20 + t, round=1, round_step=20, relative_speed=speed)) for t in range(1, steps + 1)]
        assert at == [None] * (steps - 1) + [G]
    assert algorithms.pr_sgd_hetero().agrees_on == "speed"


def test_an_epoch_of_seconds_ends_with_the_step_that_finds_them_passed():
    found = [in_seconds(0.5)(Progress(step=1, round_seconds=seconds)) for seconds in (0.0, 0.49, 0.5, 3.0)]
    assert found == [None, None, G, G]
    assert algorithms.pr_sgd_hetero(epoch_seconds=0.5).when(Run(2))(Progress(step=1, round_seconds=9.0)) is G


def taken(rule, total_steps, speeds):
    """Return the steps of every learner in a run whose mean learner is to take `total_steps`, one step in 1/speed s."""
    num_learners = len(speeds)
    due = [rule.when(Run(num_learners, learner, total_steps)) for learner in range(num_learners)]
    learners = [Progress() for _ in speeds]
    while learners[0].mean_step < total_steps:
        for progress, speed, is_due in zip(learners, speeds, due, strict=True):
            progress.round_seconds, scope = 0.0, None
            while scope is None:
                progress.step += 1
                progress.round_seconds += 1 / speed
                scope = is_due(progress)
        for progress, speed in zip(learners, speeds, strict=True):
            progress.round_step = progress.step
            progress.mean_step = sum(other.step for other in learners) / num_learners
            progress.relative_speed, progress.mean_speed = speed / min(speeds), sum(speeds) / min(speeds) / num_learners
    return [progress.step for progress in learners]


@pytest.mark.parametrize(
    ("options", "total_steps", "steps"),
    [
        ({"base_steps": 50}, 3, [3, 3]),
        (
            {"base_steps": 8},
            20,
            [14, 26],
        ),  # of the second round, 24 steps in the mean, a half: 4 and 12 became 6 and 18
        ({"epoch_seconds": 9.0}, 3, [3, 3]),
        ({"local_steps": [50, 9]}, 3, [4, 2]),
        ({"local_steps": [50, 9]}, 59, [100, 18]),
        ({"local_steps": [50, 9]}, 1, [1, 1]),
        ({"local_steps": [1, 2]}, 10, [7, 13]),
    ],
)
def test_the_mean_learner_takes_no_more_than_the_steps_of_the_run(options, total_steps, steps):
    assert taken(algorithms.pr_sgd_hetero(**options), total_steps, [1.0, 3.0]) == steps


@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 200))
def test_listed_steps_add_up_to_those_of_the_run(local_steps, total_steps):
    rule = algorithms.pr_sgd_hetero(local_steps=local_steps)
    if rule.own_pace:
        steps = taken(rule, total_steps, [1.0] * len(local_steps))
        over = sum(steps) - total_steps * len(local_steps)
        assert 0 <= over < len(local_steps)  # the last ones are cut to one each
        assert over == 0 or min(steps) > 0


@given(
    st.lists(st.floats(0.1, 9), min_size=2, max_size=7),
    st.integers(1, 200),
    st.builds(dict, base_steps=st.integers(1, 60)) | st.builds(dict, epoch_seconds=st.floats(0.1, 60)),
)
def test_measured_steps_go_beyond_those_of_the_run_by_less_than_one_in_the_mean(speeds, total_steps, options):
    steps = taken(algorithms.pr_sgd_hetero(**options), total_steps, speeds)
    assert total_steps <= sum(steps) / len(steps) < total_steps + 1


# -- refusals -----------------------------------------------------------------------------------------------------


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
        (lambda: algorithms.pr_sgd_hetero(local_steps=[]), "local_steps"),
        (lambda: algorithms.pr_sgd_hetero(local_steps=[2, 0]), "local_steps"),
        (lambda: algorithms.pr_sgd_hetero(local_steps=[2, 1.5]), "local_steps"),
        (lambda: algorithms.pr_sgd_hetero(local_steps=4), "local_steps"),
        (lambda: algorithms.pr_sgd_hetero(local_steps="fast"), "local_steps"),
        (lambda: algorithms.pr_sgd_hetero(base_steps=0), "base_steps"),
        (lambda: algorithms.pr_sgd_hetero(epoch_seconds=0.0), "epoch_seconds"),
        (lambda: algorithms.pr_sgd_hetero(epoch_seconds=math.inf), "epoch_seconds"),
        (lambda: algorithms.pr_sgd_hetero(local_steps=[2], epoch_seconds=1.0), "epoch_seconds"),
        (lambda: algorithms.lupa(0), "tau"),
        (lambda: algorithms.lupa(2.0), "tau"),
        (lambda: algorithms.lupa(True), "tau"),
        (lambda: algorithms.lupa("best"), "tau"),
        (lambda: algorithms.lupa(2, mu=0.0), "mu"),
        (lambda: algorithms.lupa(2, mu=1.0, shift=0.0), "shift"),
        (lambda: algorithms.lupa(2, shift=3.0), "shift"),
        (lambda: algorithms.ada_lupa(0), "tau0"),
        (lambda: algorithms.ada_lupa(growth="cubic"), "growth"),
        (lambda: algorithms.ada_lupa(alpha=-0.1), "alpha"),
        (lambda: algorithms.ada_lupa(alpha=math.nan), "alpha"),
        (lambda: algorithms.ada_lupa(alpha="1.1"), "alpha"),
        (lambda: algorithms.ada_lupa(rounds=0), "rounds"),
        (lambda: algorithms.ada_lupa(rounds=2, alpha=0.5), "rounds"),
        (lambda: algorithms.ada_lupa(growth="loss", alpha=0.5), "alpha"),
        (lambda: algorithms.ada_lupa(growth="loss", rounds=3), "rounds"),
        (lambda: algorithms.ada_lupa(growth="loss", mu=1.0), "shift"),
        (lambda: algorithms.ada_lupa(mu=-1.0), "mu"),
        (lambda: algorithms.ada_lupa(shift=3.0), "shift"),
        (lambda: algorithms.dasgd(0, delay=0), "tau"),
        (lambda: algorithms.dasgd(3, delay=3), "delay"),
        (lambda: algorithms.dasgd(3, delay=-1), "delay"),
        (lambda: algorithms.dasgd(3, delay=1.0), "delay"),
        (lambda: algorithms.dasgd(3, delay=True), "delay"),
        (lambda: algorithms.dasgd(3, delay=1, xi=1), "xi"),
        (lambda: algorithms.dasgd(3, delay=1, xi=-0.1), "xi"),
        (lambda: algorithms.dasgd(3, delay=1, xi=math.nan), "xi"),
        (lambda: algorithms.slowmo(0), "k"),
        (lambda: algorithms.slowmo(beta=1.0), "beta"),
        (lambda: algorithms.slowmo(outer_lr=0), "outer_lr"),
        (lambda: algorithms.diloco(0), "h"),
        (lambda: algorithms.diloco(outer_lr=-1.0), "outer_lr"),
        (lambda: algorithms.diloco(outer_momentum=1), "outer_momentum"),
        (lambda: algorithms.downpour(n_push=0), "n_push"),
        (lambda: algorithms.downpour(n_fetch=0), "n_fetch"),
        (lambda: algorithms.eamsgd(0), "tau"),
        (lambda: algorithms.eamsgd(alpha=1), "alpha"),
        (lambda: algorithms.eamsgd(alpha=0), "alpha"),
        (lambda: algorithms.eamsgd(momentum=1.0), "momentum"),
        (lambda: algorithms.build("k_avg", {"k1": 3}), "k1"),
        (lambda: algorithms.build("sgd", {"k": 3}), "k"),
    ],
)
def test_unusable_arguments_are_refused_by_name(make, option):
    with pytest.raises(InputError) as caught:
        make()
    assert caught.value.option == option


@pytest.mark.parametrize(
    ("rule", "run", "option"),
    [
        (algorithms.pr_sgd_hetero(local_steps=[2, 3]), Run(3), "local_steps"),
        (algorithms.lupa("auto"), Run(2, batch_size=8), "total_steps"),
        (algorithms.lupa("auto"), Run(2, total_steps=8), "batch_size"),
        (algorithms.ada_lupa(5, rounds=3), Run(), "total_steps"),
        (algorithms.ada_lupa(5, rounds=5), Run(total_steps=20), "rounds"),
        (algorithms.ada_lupa(5, rounds=1), Run(total_steps=20), "rounds"),
        (algorithms.ada_lupa(5, rounds=2), Run(total_steps=5), "rounds"),
    ],
)
def test_rules_that_do_not_fit_the_run_are_refused_by_name(rule, run, option):
    with pytest.raises(InputError) as caught:
        rule.when(run)
    assert caught.value.option == option


def test_a_rate_that_follows_the_longest_period_needs_the_steps_of_the_run():
    with pytest.raises(InputError) as caught:
        algorithms.ada_lupa(5, mu=1.0).rate(Run())
    assert caught.value.option == "total_steps"


def test_algorithms_are_named_as_their_constructors():
    for name in algorithms.ALGORITHMS:
        assert algorithms.build(name, {}).name == name
