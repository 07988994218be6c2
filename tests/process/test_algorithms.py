"""Every algorithm by the command line, and what it leaves behind where learners do not all take a mean at once."""

import h5py
import numpy as np
import pytest

from hpcavg import algorithms
from hpcavg.results.view import read_view
from tests.process.launch import run, trained
from tests.process.test_bad_input import refused

pytestmark = pytest.mark.process


@pytest.mark.parametrize("name", algorithms.ALGORITHMS)
def test_every_algorithm_learns_the_digits_with_its_defaults(tmp_path, name):
    summary, _ = trained(tmp_path / "run", 4, ["--algorithm", name, "--epochs", "10"])
    assert summary["algorithm"] == name
    assert summary["test_accuracy"] >= 0.9


def test_learners_at_their_own_pace_are_accounted_for_one_by_one(tmp_path):
    """5 steps of the mean learner a round; 1440 samples an epoch, which 30 of its mini-batches of 16 cover."""
    arguments = "--algorithm pr-sgd-hetero --local-steps 6,6,3 --epochs 2 --schedule cosine"
    summary, result = trained(tmp_path / "run", 3, arguments.split())
    rounds = 2 * 30 // 5
    assert summary["steps"] == rounds * 5
    assert summary["global_averages"] == rounds
    samples = summary["samples_per_learner"]
    assert samples[0] == samples[1] == 2 * samples[2] == 16 * rounds * 6
    assert summary["samples"] == sum(samples)
    assert sum(line.startswith("epoch ") for line in result.out.splitlines()) == 2
    averaging = read_view(tmp_path / "run" / "metrics", "averaging")
    assert averaging["period_steps"].tolist() == [[6] * rounds] * 2 + [[3] * rounds]
    steps = read_view(tmp_path / "run" / "metrics", "step")
    assert (steps["step"].max(axis=1)).tolist() == [6 * rounds] * 2 + [3 * rounds]
    rates = steps["learning_rate"][0].reshape(rounds, 6)  # it changes at means only
    assert (rates == rates[:, :1]).all()
    assert rates[-1, 0] < 0.2 * rates[0, 0]


def test_servers_record_every_update_that_arrives(tmp_path):
    arguments = "--algorithm downpour --num-servers 2 --epochs 2 --n-push 2 --n-fetch 6"
    summary, result = trained(tmp_path / "run", 4, arguments.split())
    assert (summary["num_learners"], summary["num_servers"], summary["num_ranks"]) == (2, 2, 4)
    assert "2 learners, 1 local group, 2 servers" in result.out
    steps = 2 * 45
    assert (summary["steps"], summary["global_averages"], summary["exchanges"]) == (steps, 0, steps // 2)
    metrics = tmp_path / "run" / "metrics"
    arrival = read_view(metrics, "arrival")
    assert (arrival["learner"] >= 0).sum(axis=1).tolist() == [0, 0, steps, steps]
    assert arrival["staleness"][2:].max() == summary["staleness_max"]
    assert arrival["staleness"][2:].mean() == pytest.approx(summary["staleness_mean"])
    averaging = read_view(metrics, "averaging")
    assert set(averaging["scope"][0]) == {b"server"}
    assert set(averaging["scope"][3]) == {b""}
    with h5py.File(metrics / "rank-00003.h5", "r") as file:
        assert file.attrs["role"] == "server"
    report = run(0, ["report", tmp_path / "run"])
    assert report.status == 0, report.err


def test_delayed_means_are_hidden_in_part_and_repeat_bit_for_bit(tmp_path):
    arguments = "--algorithm dasgd --tau 6 --delay 5 --steps 40"
    first, _ = trained(tmp_path / "first", 2, arguments.split())
    again, _ = trained(tmp_path / "again", 2, arguments.split())
    assert first["parameters_sha256"] == again["parameters_sha256"]
    assert first["global_averages"] == 6 + 1
    assert 0 <= first["hidden_fraction"] < 1
    distance = read_view(tmp_path / "first" / "metrics", "averaging")["consensus_distance"]
    assert np.isfinite(distance).all()
    assert first["consensus_distance"] == pytest.approx(distance[:, -1].mean())


def test_the_consensus_distance_is_measured_at_every_global_mean(tmp_path):
    arguments = "--algorithm lupa --tau auto --steps 60"
    summary, _ = trained(tmp_path / "run", 2, arguments.split())
    averaging = read_view(tmp_path / "run" / "metrics", "averaging")
    period = round(60 ** (2 / 3) / (2 * 16) ** (1 / 3))
    assert averaging["period_steps"][0].tolist() == [period] * (60 // period) + [60 % period] * (60 % period > 0)
    assert (averaging["consensus_distance"] > 0).all()
    assert summary["consensus_distance"] == pytest.approx(averaging["consensus_distance"][:, -1].mean())


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ("--algorithm downpour --num-servers 4", "--num-servers 4: must be below the number of ranks, 4"),
        ("--algorithm pr-sgd-hetero --local-steps 3,3", "--local-steps (3, 3): must be 4 numbers"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, arguments, line):
    assert refused(tmp_path, arguments.split()).startswith(line)
