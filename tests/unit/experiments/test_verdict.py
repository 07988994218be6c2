"""Verdicts: intervals by hand and from tables, and rules of several comparisons."""

import math

import numpy as np
import pytest

from hpcavg.experiments.verdict import Comparison, Verdict, all_of, any_of, exceeds, intervals, within

# Student's quantiles for 2 degrees of freedom, from tables.
T_95, T_975 = 4.30265, 6.20535
HOLDS, FAILS, UNDECIDED = Verdict.HOLDS, Verdict.FAILS, Verdict.UNDECIDED


def around(mean, **options):
    """Return a comparison of three values with this mean and deviation 1."""
    return Comparison("it", [mean - 1, mean, mean + 1], **options)


def test_the_interval_is_students():
    assert around(2).interval() == pytest.approx((2 - T_95 / math.sqrt(3), 2 + T_95 / math.sqrt(3)), rel=1e-5)
    assert around(2).interval(0.975) == pytest.approx((2 - T_975 / math.sqrt(3), 2 + T_975 / math.sqrt(3)), rel=1e-5)


@pytest.mark.parametrize(
    ("mean", "margin", "verdict"),
    [(2.49, 0, HOLDS), (2.47, 0, UNDECIDED), (-2.47, 0, UNDECIDED), (-2.49, 0, FAILS), (2.49, 0.1, UNDECIDED)],
)
def test_a_comparison_is_decided_where_its_interval_ends(mean, margin, verdict):
    """Half an interval is 4.30265 / sqrt(3) = 2.484."""
    assert all_of(around(mean, margin=margin)).verdict is any_of(around(mean, margin=margin)).verdict is verdict


def test_equal_values_decide_and_equal_is_not_above():
    assert all_of(Comparison("it", [0.5, 0.5])).verdict is HOLDS
    assert all_of(exceeds("it", [0.5, 0.7], [0.5, 0.7])).verdict is FAILS


def test_differences_are_taken_seed_by_seed():
    """The arms overlap widely, and each seed says the same."""
    judgement = all_of(exceeds("gain", [0.2, 0.5, 0.9], [0.1, 0.4, 0.8], unit=" %"))
    assert judgement.verdict is HOLDS
    assert judgement.statistics[0].startswith("gain: 0.1 % (0.1 to 0.1), effect size ")


@pytest.mark.parametrize("values", [[math.nan, 1.0, 1.0], [math.inf, 1.0, 1.0], [5.0]])
def test_values_that_are_missing_decide_nothing(values):
    judgement = all_of(Comparison("it", values))
    assert (judgement.verdict, judgement.seeds_to_decide) == (UNDECIDED, None)
    assert "(-inf to inf), effect size nan" in judgement.statistics[0]


def test_the_difference_of_two_runs_that_diverged_is_missing():
    assert all_of(exceeds("it", [math.inf, 1.0], [math.inf, 0.0])).verdict is UNDECIDED


def test_a_claim_that_needs_all_fails_only_beyond_bonferronis_interval():
    """With two comparisons that is the interval of 97.5 %, half of which is 6.20535 / sqrt(3) = 3.583."""
    assert all_of(around(9), around(2.49)).verdict is HOLDS
    assert all_of(around(9), around(-2.49)).verdict is UNDECIDED
    assert all_of(around(9), around(-3.57)).verdict is UNDECIDED
    assert all_of(around(9), around(-3.59)).verdict is FAILS
    assert all_of(around(9), around(0)).verdict is UNDECIDED


def test_a_claim_that_needs_one_is_the_other_way_round():
    assert any_of(around(-9), around(-2.49)).verdict is FAILS
    assert any_of(around(-9), around(3.57)).verdict is UNDECIDED
    assert any_of(around(-9), around(3.59)).verdict is HOLDS
    assert any_of(around(-9), around(0)).verdict is UNDECIDED


def test_two_arms_are_within_a_margin_if_they_differ_by_less_in_both_directions():
    one = np.array([1.0, 2.0, 3.0])
    assert all_of(*within("it", one, one + np.array([0.09, 0.1, 0.11]), 0.2)).verdict is HOLDS
    assert all_of(*within("it", one, one + np.array([0.39, 0.4, 0.41]), 0.2)).verdict is FAILS
    assert all_of(*within("it", one, one - [0.39, 0.4, 0.41], 0.2)).verdict is FAILS
    assert all_of(*within("it", one, one + np.array([-1, 0, 1]), 0.2)).verdict is UNDECIDED


@pytest.mark.parametrize(("effect", "seeds"), [(0.5, 34), (0.8, 15), (1.0, 10)])
def test_the_seeds_that_would_decide_are_those_of_tables(effect, seeds):
    """Two-sided paired t-test at 5 % with a power of 80 %, as G*Power and the tables of Cohen (1988) have it."""
    assert around(effect).seeds_to_decide() == seeds
    assert around(-effect).seeds_to_decide() == seeds
    assert around(1 + effect, margin=1).seeds_to_decide() == seeds


def test_what_cannot_be_decided_has_no_number():
    assert around(0).seeds_to_decide() is None
    assert around(0.01).seeds_to_decide() is None
    assert all_of(around(9), around(0)).seeds_to_decide is None


def test_the_number_of_seeds_is_that_of_the_open_comparison_that_needs_most():
    assert all_of(around(9), around(0.8), around(0.5)).seeds_to_decide == 34
    assert all_of(around(9), around(3)).seeds_to_decide is None  # it is decided


def test_a_comparison_on_the_wrong_side_decides_alone_and_needs_more_seeds_for_it():
    """Two-sided paired t-tests at 2.5 %: for effect 1, simulated tests have a power of 0.79 with 12, 0.84 with 13."""
    assert around(1).seeds_to_decide(0.975) == around(-1).seeds_to_decide(0.975) == 13
    assert all_of(around(-1), around(0)).seeds_to_decide == 13
    assert any_of(around(1), around(0)).seeds_to_decide == 13
    assert all_of(around(-1), around(-0.8)).seeds_to_decide == 13
    assert any_of(around(1), around(0.8)).seeds_to_decide == 13
    assert all_of(around(-0.01), around(0.5)).seeds_to_decide is None
    assert all_of(around(0.8), around(math.nan)).seeds_to_decide is None


def test_several_comparisons_have_the_interval_with_which_one_decides_too():
    (alone,), (one, _) = all_of(around(2)).statistics, all_of(around(2), around(9)).statistics
    assert alone.startswith("it: 2 (-0.484 to 4.48), effect size 2")
    assert one.startswith("it: 2 (-0.484 to 4.48; with all together -1.58 to 5.58), effect size 2")


def test_bands_leave_out_what_is_missing():
    low, high = intervals([[1.0, 5.0], [2.0, math.nan], [3.0, math.nan]])
    half = T_95 / math.sqrt(3)
    assert (low[0], high[0]) == pytest.approx((2 - half, 2 + half), rel=1e-5)
    assert (low[1], high[1]) == (-math.inf, math.inf)
