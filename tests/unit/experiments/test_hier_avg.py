"""The arithmetic of the experiments of Hier-AVG, with numbers by hand."""

import numpy as np
import pytest

from hpcavg.experiments.experiment import Scale
from hpcavg.experiments.functions.problems import SETTINGS
from hpcavg.experiments.hier_avg import bounds, networks, table_1, theorem_3_1, theorem_3_2, theorem_3_4, theorem_3_6

RESULT = {
    "settings": {"learners": 4, "steps": 8, "batch_size": 2, "rate": 0.25, "k1": 2, "k2": 4, "group_size": 2},
    "constants": {"smoothness": 1.0, "start_gap": 3.0, "variance": 8.0, "second_moment": 10.0},
    "gradient_norm2": [8.0, 0.0, 0.0, 0.0, 4.0, 0.0, 0.0, 0.0],
}


def test_bound_of_all_steps():
    # 2 * 3 / (0.25 * 8) + 4 * (0.25 * 4)^2 * 10 + 0.25 * 8 / (4 * 2)
    assert bounds.bound_of_all_steps(RESULT) == pytest.approx(3 + 40 + 0.25)


def test_bound_at_global_means():
    # K2 - delta = 4 - 4 * 3 / 2 / 16 = 3.625; N = 2
    start = 2 * 3 / (2 * 3.625 * 0.25)
    of_mean = 0.25 * 8 * 16 / (4 * 2 * 3.625)
    # (4 - 2) (16 + 2 - 3) / 2 + (2 - 1) (12 + 2 - 2) = 27
    of_group = 0.0625 * 8 * 4 / (12 * 2 * 3.625) * 27
    assert bounds.bound_at_global_means(RESULT) == pytest.approx(start + of_mean + of_group)


def test_the_bound_of_proofs_has_one_delta():
    # K2 - delta = 4 - 1 / 16 in place of 3.625 divides all terms.
    assert bounds.bound_with_one_delta(RESULT) == pytest.approx(bounds.bound_at_global_means(RESULT) * 3.625 / 3.9375)


@pytest.mark.parametrize(("theorem", "needed"), [(theorem_3_4, any), (theorem_3_6, all)])
def test_the_bounds_on_the_page_are_as_the_theorem_says(theorem, needed):
    """Theorem 3.4: smaller for some K2 than for 1. Theorem 3.6: smaller for K2 up to 1.6 K than for K-AVG with K."""
    for problem in ("ripples", "logistic"):
        runs = [make(0) for arm, make in theorem.arms(Scale()).items() if arm.startswith(f"{problem}, ")]
        constants = SETTINGS[problem]().constants()
        first, *others = (
            bounds.bound_with_one_delta({"settings": run.options, "constants": constants}) for run in runs
        )
        assert needed(other < first for other in others)


def test_norms():
    assert bounds.norm_of_all_steps(RESULT) == 1.5
    assert bounds.norm_at_global_means(RESULT) == 6  # after 0 and 4 steps


def test_a_part_of_a_period_does_not_count():
    settings = {**RESULT["settings"], "steps": 7}
    assert bounds.norm_at_global_means({**RESULT, "settings": settings}) == 8


def test_slope():
    norms = [np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.array([4.0, 0.5])]
    assert bounds.slope("", [1, 2, 4], norms, -1, 0.0).values == pytest.approx([-1, 1])


def test_the_theorems_conditions_are_met():
    for theorem in (theorem_3_2, theorem_3_4, theorem_3_6):
        for make in theorem.arms(Scale()).values():
            options = make(0).options
            assert bounds.room_of_rate(options["rate"], options["k2"]) >= 0
            if theorem is not theorem_3_2:
                constants = SETTINGS[options["problem"]]().constants()
                assert bounds.excess_of_start({**options, "group_size": 4}, constants) > 1
    for make in theorem_3_1.arms(Scale()).values():
        assert make(0).options["rate"] <= 1


@pytest.mark.parametrize("name", SETTINGS)
def test_the_variance_is_nowhere_larger(name):
    setting = SETTINGS[name]()
    for scale in (0, 1, 10):
        assert setting.problem.variance(scale * setting.start) <= setting.variance
    assert setting.problem.smoothness == pytest.approx(1)


def test_no_seed_chooses_its_own_k():
    errors = np.array([[0.1, 0.9, 0.2], [0.2, 0.1, 0.3]])
    # Over the other seeds: (1.1, 0.4), (0.3, 0.5), (1.0, 0.3)
    assert table_1.best_of_others(errors).tolist() == [1, 0, 1]


def test_a_diverged_run_counts_as_guessing():
    run = {"has_diverged": True, "summary": {"test_accuracy": 0.5}, "evaluations": {"train_loss": []}}
    fine = {"has_diverged": False, "summary": {"test_accuracy": 0.5}, "evaluations": {"train_loss": [5.0, 2.0, 1.0]}}
    results = networks.Results({"mlp": [run, fine]})
    assert networks.test_errors(results)["mlp"].tolist() == [0.9, 0.5]
    assert networks.train_losses(results)["mlp"] == pytest.approx([np.log(10), 1.0])
    assert networks.train_losses(results, last_part=0.5)["mlp"] == pytest.approx([np.log(10), 1.5])
