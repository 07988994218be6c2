"""Tasks: the built-in ones, the user's own, and what is said of those that cannot be used."""

import dataclasses
import math
import sys

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcavg import Topology, tasks
from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.machine.devices import choose_device
from hpcavg.tasks import Data, digits, made_up_epsilon, synthetic
from hpcavg.training.evaluation import evaluate

OWN = """
from hpcavg.tasks import digits
def good(config):
    return digits.task(config)
def not_a_task(config):
    return 3
def raises(config):
    return 1 / 0
"""


def test_digits_are_split_once_and_for_all():
    data = digits.load_data()
    assert data.train_inputs.shape == (1440, 1, 8, 8)
    assert data.test_inputs.shape == (357, 1, 8, 8)
    assert data.train_inputs.dtype == np.float32
    assert (data.train_inputs.min(), data.train_inputs.max()) == (0, 1)
    assert np.bincount(data.train_targets).min() > 100
    again = digits.load_data()
    assert all(np.array_equal(a, b) for a, b in zip(data, again, strict=True))
    train = {image.tobytes() for image in data.train_inputs}
    assert not train & {image.tobytes() for image in data.test_inputs}


def test_synthetic_images_have_the_asked_shape_and_can_be_told_apart():
    data = synthetic.load_data((2, 6, 5), 3, 3000, seed=1)
    assert data.train_inputs.shape == (3000, 2, 6, 5)
    assert len(data.test_inputs) == 600
    means = np.stack([data.train_inputs[data.train_targets == c].mean(axis=0).ravel() for c in range(3)])
    nearest = (data.test_inputs.reshape(600, -1) @ means.T - (means**2).sum(axis=1) / 2).argmax(axis=1)
    assert (nearest == data.test_targets).mean() > 0.95


def test_made_up_epsilon_is_the_same_in_every_run_and_can_be_told_apart():
    data = made_up_epsilon.load_data(300)
    assert data.train_inputs.shape == (300, 2000)
    assert data.test_inputs.dtype == np.float32
    assert np.linalg.norm(data.test_inputs, axis=1) == pytest.approx(1, abs=1e-6)
    fewer = made_up_epsilon.load_data(100)
    assert np.array_equal(fewer.train_inputs, data.train_inputs[:100])
    assert np.array_equal(fewer.test_inputs, data.test_inputs)
    # The mean of 300 samples is 3 normals and noise of length sqrt(2000 / 300), at a cosine of 0.76 to the normal: of 3
    # deviations between a class and the plane, 2.3 are left.
    normal = (2 * data.train_targets - 1) @ data.train_inputs
    assert 0.97 < ((data.test_inputs @ normal > 0) == data.test_targets).mean() < 1


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("task", ["digits", "synthetic"])
def test_models_fit_their_task(task, model):
    loaded = tasks.load(Config(task=task, model=model, num_samples=20))
    data = tasks.load_data(loaded)
    output = loaded.build_model()(torch.from_numpy(data.train_inputs[:4]))
    targets = torch.from_numpy(data.train_targets[:4])
    assert output.shape == (4, 10)
    loaded.loss(output, targets).backward()
    assert 0 <= int(loaded.count_correct(output, targets)) <= 4


def test_a_users_own_task(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    assert tasks.load(Config(task=f"{path}:good")).name == "digits"


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("not_a_task", "a function that returns a hpcavg.tasks.Task, not int"),
        ("raises", "mine.py:8: ZeroDivisionError: division by zero"),
        ("absent", "a function of that file; it has no 'absent'"),
    ],
)
def test_a_task_that_cannot_be_used(tmp_path, function, says):
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    with pytest.raises(InputError) as caught:
        tasks.load(Config(task=f"{path}:{function}"))
    assert caught.value.option == "task"
    assert says in str(caught.value)


def test_a_file_with_a_syntax_error(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def task(config:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        tasks.load(Config(task=f"{path}:task"))


@pytest.mark.parametrize("name", ["fancy", "fancy:task", "nowhere.py:task", "nowhere.py"])
def test_no_such_task(name):
    with pytest.raises(InputError, match=r"path/to/file\.py:function"):
        tasks.load(Config(task=name))


def fail():
    raise OSError("no such\nfile")


@pytest.mark.parametrize(
    ("load", "says"),
    [
        (fail, "OSError: no such file"),
        (lambda: Data([1], np.ones(1), np.ones(1), np.ones(1)), "whose train_inputs is a NumPy array"),
        (lambda: Data(np.ones(2), np.ones(3), np.ones(1), np.ones(1)), "train has 2 inputs, 3 targets"),
        (lambda: Data(np.ones(2), np.ones(2), np.ones(0), np.ones(0)), "whose test_inputs"),
        (lambda: Data(np.array(["a"]), np.ones(1), np.ones(1), np.ones(1)), "whose train_inputs is a NumPy array"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (lambda: None, "a function load_data that returns a hpcavg.tasks.Data"),
    ],
)
def test_data_that_cannot_be_used(load, says):
    task = dataclasses.replace(digits.task(Config()), load_data=load)
    with pytest.raises(InputError) as caught:
        tasks.load_data(task)
    assert says in str(caught.value)


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert choose_device("auto", 3) == torch.device("cpu")
    with pytest.raises(InputError, match="no CUDA device"):
        choose_device("cuda", 0)


def test_ranks_of_a_node_take_turns_on_its_gpus(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [choose_device("auto", rank).index for rank in range(6)] == [0, 1, 2, 3, 0, 1]
    assert len(chosen) == 6
    assert choose_device("cpu", 0) == torch.device("cpu")


def test_targets_of_another_shape_are_not_counted():
    with pytest.raises(ValueError, match="targets of shape"):
        tasks.count_correct(torch.zeros(4, 3), torch.zeros(4, 1))


def test_top5_by_hand():
    """The largest of class 0 to 10 are 10, 9, ...: of the targets 10, 6, 5 and 0, two are among five."""
    rising, targets = torch.arange(11.0).repeat(4, 1), torch.tensor([10, 6, 5, 0])
    assert int(tasks.count_top5(rising, targets)) == 2
    assert int(tasks.count_correct(rising, targets)) == 1
    assert math.isnan(tasks.count_top5(rising[:, :10], targets))


@pytest.mark.parametrize(
    ("count", "num_classes", "accuracies"),
    [
        (tasks.count_correct, 11, (0.25, 0.5)),
        (tasks.count_correct, 10, (0.25, math.nan)),
        (lambda output, target: torch.tensor(len(target)), 11, (1.0, math.nan)),
        (None, 11, (math.nan, math.nan)),
    ],
)
def test_scores_by_hand(count, num_classes, accuracies):
    """Batches of 3 and 1 samples with losses 1 and 5 have the mean (3 * 1 + 5) / 4."""

    def outputs():
        for targets, loss in (([10, 6, 5], 1.0), ([0], 5.0)):
            output = loss - 1 + torch.arange(float(num_classes)).repeat(len(targets), 1)
            yield output, torch.tensor(targets) + num_classes - 11

    def loss(output, targets):
        return output[0, 0] + 1

    task = tasks.Task("test", None, None, loss, count)
    topology = Topology(MPI.COMM_SELF)
    score = evaluate(outputs, task, topology)
    topology.free()
    assert (score.loss, score.accuracy, score.top5_accuracy) == pytest.approx((2.0, *accuracies), nan_ok=True)
