"""Learning rates over a run, by hand."""

import math

import pytest
import torch

from hpcavg.config.options import Config
from hpcavg.training import optimizers


def rates(num_steps, **options):
    config = Config(learning_rate=1.0, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = optimizers.build_scheduler(config.optimization, optimizer, num_steps, 10)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return found


def test_constant():
    assert rates(3) == [1.0, 1.0, 1.0]


def test_step_decay():
    assert rates(5, schedule="step", decay_steps=2, decay_factor=0.1) == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert rates(6, schedule="step", decay_factor=0.5) == pytest.approx([1, 1, 0.5, 0.5, 0.25, 0.25])


def test_decay_after_epochs_of_ten_steps():
    found = rates(40, schedule="step", decay_epochs=(1, 3), decay_factor=0.5)
    assert found == pytest.approx([1.0] * 10 + [0.5] * 20 + [0.25] * 10)
    found = rates(40, schedule="step", decay_epochs=(2,), warmup_steps=5)
    assert found[5:] == pytest.approx([1.0] * 15 + [0.1] * 20)


def test_cosine_falls_to_nearly_zero():
    expected = [(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]
    assert rates(10, schedule="cosine") == pytest.approx(expected)


def test_one_cycle_rises_to_the_rate_and_falls():
    found = rates(20, schedule="one-cycle")
    assert max(found) == pytest.approx(1.0, abs=0.01)
    assert found[0] == pytest.approx(1 / 25)
    assert found[-1] < 0.02


def test_one_cycle_of_straight_lines():
    found = rates(19, schedule="one-cycle", cycle_peak=0.25, cycle_start=0.5, cycle_end=0.1, cycle_shape="linear")
    assert found[:5] == pytest.approx([0.5, 0.625, 0.75, 0.875, 1.0])
    assert found[4:] == pytest.approx([1 - 0.06 * step for step in range(15)])


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine", "one-cycle"])
def test_warm_up_is_a_straight_line_and_then_the_schedule(schedule):
    found = rates(12, schedule=schedule, warmup_steps=4)
    if schedule != "one-cycle":
        assert found[:5] == pytest.approx([0.01, 0.2575, 0.505, 0.7525, 1.0])
    assert found[4:] == pytest.approx(rates(8, schedule=schedule))


def test_warm_up_longer_than_the_run_is_cut():
    assert rates(3, warmup_steps=100) == pytest.approx([0.01, 0.505, 1.0])
    assert rates(1, warmup_steps=100) == [1.0]


@pytest.mark.parametrize("options", [{"schedule": "step"}, {"schedule": "cosine", "warmup_steps": 2}])
def test_the_rate_follows_without_a_word_where_a_run_goes_on_with_new_optimizers(options):
    config = Config(learning_rate=1.0, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    scheduler = optimizers.build_scheduler(config.optimization, optimizer, 6, 10)
    for _ in range(5):
        scheduler.step()  # any warning is an error here
    assert optimizer.param_groups[0]["lr"] == pytest.approx(rates(6, **options)[5])
