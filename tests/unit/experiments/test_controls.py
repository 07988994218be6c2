"""What keeps experiments from saying "holds" where everything would pass."""

import numpy as np
import pytest

from hpcavg.experiments.k_avg import choice_of_k, setting
from hpcavg.experiments.training_results import less, made_up, more
from hpcavg.experiments.verdict import Comparison, Verdict, all_of, given

HOLDS, FAILS, OPEN = (all_of(Comparison("it", values)) for values in ([1.0, 1.1], [-1.0, -1.1], [-1.0, 1.2]))
COSTS, COSTS_NOTHING, MAY_COST = (
    Comparison("cost", values, 5) for values in ([9.0, 9.1, 9.2], [5.0, 5.1, 4.5], [9.0, 1.0, 8.0])
)


@pytest.mark.parametrize("judgement", [HOLDS, FAILS, OPEN], ids=["holds", "fails", "open"])
def test_a_control_that_holds_changes_nothing_but_is_told(judgement):
    found = given(COSTS, judgement)
    assert (found.verdict, found.seeds_to_decide) == (judgement.verdict, judgement.seeds_to_decide)
    assert found.statistics == (*judgement.statistics, f"control: {COSTS}")


@pytest.mark.parametrize("control", [COSTS_NOTHING, MAY_COST], ids=["costs nothing", "may cost"])
def test_without_its_control_a_claim_does_not_hold_and_still_can_fail(control):
    assert given(control, HOLDS).verdict is Verdict.UNDECIDED
    assert given(control, FAILS).verdict is Verdict.FAILS


def test_seeds_help_only_a_control_above_its_margin():
    assert given(MAY_COST, HOLDS).seeds_to_decide == MAY_COST.seeds_to_decide() > 3
    assert given(COSTS_NOTHING, HOLDS).seeds_to_decide is None


def test_percent_are_of_the_second_value():
    assert less("loss", [1.5, 3.0], [2.0, 3.0]).values == [25, 0]
    assert more("loss", [1.5, 3.0], [1.0, 3.0]).values == [50, 0]
    assert less("loss", [1.04], [1.0]).mean > less("loss", [1.04], [1.0]).margin > less("loss", [1.06], [1.0]).mean


def test_of_pure_noise_no_choice_gains_on_the_other_seeds():
    """The best of four on the same seeds is above the first by 1.03 deviations, on average."""
    accuracy = np.random.default_rng(0).standard_normal((2000, 4, 5))
    gains = [setting.best_on_others(dict(zip((1, 4, 16, 64), each, strict=True)))[1] - each[0] for each in accuracy]
    assert np.mean(gains) == pytest.approx(0, abs=0.05)


@pytest.mark.parametrize(
    ("few", "many", "verdict"),
    [(0.7, 0.6, Verdict.HOLDS), (0.65, 0.6, Verdict.FAILS), (0.7, 0.69, Verdict.FAILS)],
    ids=["as the paper", "costs few learners", "costs many learners nothing"],
)
def test_figures_5_and_6_have_two_halves(few, many, verdict):
    """The accuracy with K = 64; that with K = 1 is 0.7."""
    accuracy = {f"mlp, P = {p}, K = {k}": 0.7 for p in (8, 64) for k in (1, 64)}
    results = made_up(accuracy | {"mlp, P = 8, K = 64": few, "mlp, P = 64, K = 64": many})
    assert choice_of_k.judge(results).judgement.verdict is verdict
