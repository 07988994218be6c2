"""Results of the seeds of each arm, and what tables make of them."""

import math

import numpy as np
import pytest

from hpcavg.experiments import training_results
from hpcavg.experiments.experiment import Results, table_of
from hpcavg.experiments.training_results import curves, made_up


def curve(*accuracies):
    return {"evaluations": {"epoch": list(range(1, len(accuracies) + 1)), "test_accuracy": list(accuracies)}}


def test_values_come_seed_by_seed_and_are_nan_where_a_run_has_none():
    results = Results({"a": [{"x": {"y": 1.0}}, {"x": {"y": None}}, {"x": {}}, {}]})
    np.testing.assert_array_equal(results.values_of("a", "x", "y"), [1, math.nan, math.nan, math.nan])


def test_curves_of_runs_that_ended_early_end_with_nan():
    results = Results({"a": [curve(0.1), {}, curve(0.2, 0.3)]})
    values = results.values_of("a", "evaluations", "test_accuracy")
    np.testing.assert_array_equal(values, [[0.1, math.nan], [math.nan, math.nan], [0.2, 0.3]])
    (line,) = curves(results, "evaluations", "epoch", "test_accuracy")
    np.testing.assert_array_equal(line.x, [1, 2])


def test_a_table_has_mean_and_deviation():
    """(1 + 2 + 6) / 3 = 3; the squares of the differences are 4, 1 and 9, whose sum over 2 is 7."""
    assert table_of({"a": [1, 2, 6]}, digits=2) == [["a", "3.00 ± 2.65"]]
    assert table_of({"a": [0.5]}, factor=100) == [["a", "50.0"]]


def test_made_up_results_are_near_what_they_are_made_for():
    results = made_up({"a": 0.9, "b": 0.5}, loss={"b": 2.0}, seeds=4)
    accuracies = training_results.at_end(results, "test_accuracy", diverged=0.1)
    assert list(accuracies) == ["a", "b"]
    assert accuracies["a"].shape == (4,)
    assert accuracies["a"] == pytest.approx(0.9, abs=5e-3)
    assert results.values_of("b", "summary", "train_loss") == pytest.approx(2.0, rel=5e-2)
