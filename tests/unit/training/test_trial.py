"""Data that do not divide, and labels and inputs of other kinds: trained on, or one line that says what to do."""

import time

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcavg import Topology, tasks
from hpcavg.checkpoints.manager import CheckpointManager
from hpcavg.cli import parsers
from hpcavg.config.options import Config
from hpcavg.errors import InputError
from hpcavg.results import summary
from hpcavg.tasks import Data
from hpcavg.training.loader import BatchLoader
from hpcavg.training.loop import Loop
from hpcavg.training.trainer import Trainer

TASKS = """
import numpy as np
import torch
from hpcavg.tasks import Data, Task


class Flat(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


class Plain(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(4, 3))


class Images(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Unflatten(1, (1, 2, 2)), torch.nn.BatchNorm2d(1), torch.nn.Flatten(), Plain())


class Halves(Plain):
    def forward(self, x):
        return super().forward(x.view(2, len(x) // 2, 4).flatten(0, 1))


class Broken(Plain):
    def forward(self, x):
        raise KeyError("no such layer")


class Unready(Plain):
    def forward(self, x):
        return super().forward(x) if self.training else self.head(x)


def count(output, targets):
    return (output.argmax(1) == targets).sum()


def misspelt(output, targets):
    return (output.argmax(1) == target).sum()


def pairs_only(output, targets):
    return (output.argmax(1) == targets).view(-1, 2).sum()


def both(output, targets):
    return output.argmax(1) == targets


def loss_of_two(output, targets):
    assert torch.is_grad_enabled() or len(targets) > 1, "one sample has no variance"
    return torch.nn.functional.cross_entropy(output, targets)


def task(
    train=33,
    test=9,
    net=Flat,
    labels=np.int64,
    first=0,
    inputs=np.float32,
    loss=torch.nn.CrossEntropyLoss(),
    count=count,
):
    def load():
        rng = np.random.default_rng(0)
        x, y = rng.normal(size=(train + test, 4)).astype(inputs), (np.arange(train + test) % 3 + first).astype(labels)
        return Data(x[:train], y[:train], x[train:], y[train:])

    return lambda config: Task("mine", net, load, loss, count)


lone, even, plain, images, halves, broken = task(), task(32), *(task(net=n) for n in (Plain, Images, Halves, Broken))
few, one_test, double = task(3), task(32, test=1), task(32, inputs=np.float64)
small, unsigned, large = (task(32, labels=kind) for kind in (np.int32, np.uint8, np.uint16))
floats, flags, from_one, below = task(32, labels="f4"), task(32, labels=bool), task(32, first=1), task(32, first=-1)
no_such, by_two, vector = (task(32, count=metric) for metric in (misspelt, pairs_only, both))
unready, uncounted, no_single = task(32, net=Unready), task(32, count=None), task(32, loss=loss_of_two)
ignored = task(32, first=-1, loss=torch.nn.CrossEntropyLoss(ignore_index=-1))
"""
ONE_VALUE = "ValueError: Expected more than 1 value per channel when training, got input size torch.Size([1, 8])"


@pytest.fixture
def own(tmp_path):
    """Return what trains, with the options given, on a task of the file above and returns the trainer."""
    (tmp_path / "mine.py").write_text(TASKS)

    def train(arguments, name, folder="run"):
        task = f"{tmp_path}/mine.py:{name}"
        command = (
            f"{arguments} --task {task} --epochs 2 --checkpoint-minutes 0 --threads 1 --output {tmp_path}/{folder}"
        )
        trainer = Trainer(parsers.parse_train(command.split()))
        assert trainer.train() == 0
        return trainer

    return train


@pytest.mark.parametrize(
    ("arguments", "name", "steps", "samples"),
    [
        ("--batch-size 16 --drop-last", "lone", 4, 64),
        ("--batch-size 16 --drop-last --partition by-class --buffers recompute --loader-threads 2", "lone", 4, 64),
        ("--batch-size 16 --drop-last", "even", 4, 64),
        ("--batch-size 33 --drop-last", "lone", 2, 66),
        ("--batch-size 15", "lone", 6, 66),
        ("--batch-size 16", "plain", 6, 66),
        ("--batch-size 16", "images", 6, 66),  # one sample of several values per channel
        ("--batch-size 3", "few", 2, 6),
        ("--batch-size 16", "one_test", 4, 64),
        ("--batch-size 16", "double", 4, 64),
        ("--batch-size 16", "small", 4, 64),
        ("--batch-size 16", "unsigned", 4, 64),
        ("--batch-size 16", "large", 4, 64),
        ("--batch-size 16", "ignored", 4, 64),
        ("--batch-size 16", "uncounted", 4, 64),
        ("--batch-size 16 --test-batch-size 9", "no_single", 4, 64),
    ],
)
def test_what_can_be_trained_on(own, arguments, name, steps, samples):
    trainer = own(arguments, name)
    assert (trainer.averager.progress.step, trainer.state.totals.samples) == (steps, [samples])
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


LAST = "the last mini-batch of an epoch has 1 of a learner's 33 samples, and the model does not take it"


@pytest.mark.parametrize(
    ("arguments", "name", "line"),
    [
        ("--batch-size 16", "lone", f"16: must be another, or given with --drop-last: {LAST} ({ONE_VALUE})"),
        ("--batch-size 32", "halves", f"32: must be another, or given with --drop-last: {LAST} (FILE:24: RuntimeError"),
        ("--batch-size 1", "lone", f"1: must be at least 2: the model does not take one sample alone ({ONE_VALUE})"),
        ("--batch-size 16 --drop-last", "few", "16: must be at most 3, a learner's share of 3 samples over 1 learners"),
        ("--task", "broken", "one whose model and loss take its data: FILE:29: KeyError: 'no such layer'"),
        ("--task", "no_such", "one whose count_correct takes its test data: FILE:42: NameError: name 'target' is not"),
        ("--task --test-batch-size 4", "by_two", "one whose count_correct takes its test data: FILE:46: RuntimeError:"),
        ("--task", "vector", "one whose count_correct takes its test data: ValueError: only one element"),
        ("--task", "unready", "one whose model takes its test data: FILE:34: AttributeError: 'Unready' object has no"),
        ("--task --test-batch-size 4", "no_single", "one whose loss takes its test data: FILE:54: AssertionError: one"),
        ("--task", "floats", "one whose train_targets are integers, not float32"),
        ("--task", "flags", "one whose train_targets are integers, not bool"),
        ("--task", "from_one", "one whose labels are 0 to 2, for the model's 3 outputs; train_targets hold 3"),
        ("--task", "below", "one whose labels are 0 to 2, for the model's 3 outputs; train_targets hold -1"),
    ],
)
def test_what_cannot_is_refused_in_one_line(own, tmp_path, arguments, name, line):
    with pytest.raises(InputError) as caught:
        own(arguments.removeprefix("--task"), name)
    option = "--batch-size " if "--task" not in arguments else f"--task {tmp_path}/mine.py:{name}: must be "
    assert caught.value.as_option().startswith(option + line.replace("FILE", f"{tmp_path}/mine.py"))
    assert "\n" not in caught.value.as_option()
    assert not (tmp_path / "run").exists()


def test_the_trial_leaves_no_trace(own, monkeypatch):
    trained = own("--batch-size 15 --drop-last", "lone").model.state_dict()
    monkeypatch.setattr("hpcavg.training.trial.check", lambda *_: None)
    untried = own("--batch-size 15 --drop-last", "lone", "untried").model.state_dict()
    for name, value in trained.items():
        assert torch.equal(value, untried[name]), name


def test_the_time_of_evaluations_and_checkpoints_is_told(own, monkeypatch, tmp_path):
    def delayed(function, seconds):
        def slow(*arguments, **keywords):
            time.sleep(seconds)
            return function(*arguments, **keywords)

        return slow

    monkeypatch.setattr(Loop, "_evaluate", delayed(Loop._evaluate, 0.1))
    monkeypatch.setattr(CheckpointManager, "write", delayed(CheckpointManager.write, 0.3))
    own("--batch-size 16 --checkpoint-steps 1", "plain")
    told = summary.read(tmp_path / "run")
    assert told["evaluation_s"] >= 4 * 0.1  # twice in each epoch
    assert told["checkpoint_s"] >= 6 * 0.3
    parts = ("compute_s", "data_s", "averaging_blocked_s", "evaluation_s", "checkpoint_s")
    assert sum(told[name] for name in parts) <= told["wall_s"]
    shown = dict(summary.rows(tmp_path, told))
    assert shown["evaluation"] == f"{told['evaluation_s']:.2f} s"
    assert shown["checkpoints"] == f"{told['checkpoint_s']:.2f} s"


@pytest.mark.parametrize("partition", ["shard", "shared", "by-class", "dirichlet"])
def test_an_epoch_without_its_last_mini_batch(partition):
    rng = np.random.default_rng(0)
    data = Data(np.arange(50, dtype=np.float32)[:, None], rng.integers(3, size=50), np.zeros((1, 1)), np.zeros(1, int))
    task = tasks.Task("numbers", lambda: torch.nn.Linear(1, 3), lambda: data)
    topology = Topology(MPI.COMM_SELF)
    config = Config(batch_size=8, drop_last=True, partition=partition)
    loader = BatchLoader(task, config, topology, torch.device("cpu"))
    assert (loader.steps_per_epoch, loader.shortest, loader.share) == (6, 8, 50)
    whole = BatchLoader(task, Config(batch_size=8, partition=partition), topology, torch.device("cpu"))
    assert (whole.steps_per_epoch, whole.shortest) == (7, 2)
    for epoch in range(2):
        inputs = list(whole.train_inputs(epoch))
        assert [len(batch) for batch in inputs] == [8] * 6 + [2]
        assert all(map(torch.equal, loader.train_inputs(epoch), inputs[:6]))
        assert len(list(loader.train_inputs(epoch))) == 6
        for batch in inputs[:6]:
            found_epoch, found, targets = loader.next()
            assert found_epoch == [epoch]
            assert torch.equal(found, batch)
            assert targets.dtype == torch.int64
        assert int(loader.about()["label_counts"].sum()) == 48
    topology.free()
