"""The arithmetic of DaSGD's experiments, and means that take a known time."""

import math
import time

import pytest
import torch
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.engines.mpi import MpiEngine
from hpcavg.experiments.dasgd import figure_5c, section_3_3, table_1, table_1_batch, table_1_delay
from hpcavg.experiments.dasgd.networks import final, not_many_more
from hpcavg.experiments.dasgd.networks import test_errors as errors_of
from hpcavg.experiments.experiment import Results
from hpcavg.experiments.functions.overlap import slowly
from hpcavg.experiments.verdict import Verdict


def test_a_slow_mean_takes_its_time_and_is_right():
    topology = Topology(MPI.COMM_SELF, learners_per_rank=2)
    started = time.perf_counter()
    pending = slowly(MpiEngine(topology), lambda: 0.05)([torch.tensor([[1.0, 2.0], [3.0, 4.0]])], GLOBAL)
    (mean,) = pending.wait()
    assert time.perf_counter() - started >= 0.05
    assert pending.done_s - started >= 0.05
    assert mean.tolist() == [2.0, 3.0]
    topology.free()


def test_diverged_runs_count_as_guessing():
    summaries = [(False, 0.75, 0.5), (True, 0.99, 0.01), (False, math.nan, math.nan)]
    runs = [
        {"has_diverged": has_diverged, "summary": {"test_accuracy": accuracy, "test_loss": loss}}
        for has_diverged, accuracy, loss in summaries
    ]
    results = Results({"arm": runs})
    assert errors_of(results)["arm"].tolist() == pytest.approx([0.25, 0.9, 0.9])
    assert final(results, "test_loss")["arm"].tolist() == pytest.approx([0.5, math.log(10), math.log(10)])


def test_more_errors_are_told_in_percent_of_the_base():
    errors = {"one": torch.tensor([0.12, 0.10]).numpy(), "base": torch.tensor([0.10, 0.20]).numpy()}
    comparison = not_many_more(errors, "one", "base", 10.0)
    assert list(comparison.values) == pytest.approx([-20.0, 50.0], rel=1e-5)
    assert comparison.margin == -10.0


def test_the_papers_own_table_passes_the_rules():
    """Table 1: a batch of 32 on one learner, 1024 on 32, local SGD and DaSGD."""
    table = {
        "GoogleNet": (0.9467, 0.9409, 0.9468, 0.9444),
        "VGG-16": (0.9362, 0.9264, 0.9330, 0.9343),
        "ResNet-50": (0.9113, 0.9037, 0.9062, 0.9088),
        "ResNet-101": (0.9116, 0.9019, 0.9061, 0.9045),
        "DenseNet-121": (0.9367, 0.9332, 0.9369, 0.9357),
        "MobileNetV2": (0.9230, 0.9304, 0.9241, 0.9304),
        "ResNeXt29": (0.9475, 0.9403, 0.9424, 0.9415),
        "DPN-92": (0.9507, 0.9354, 0.9513, 0.9502),
    }
    columns = (table_1.SMALL, table_1.LARGE, table_1.LOCAL, table_1.DELAYED)
    runs = {
        f"{model}, {column}": [
            {
                "has_diverged": False,
                "summary": {"test_accuracy": accuracy},
                "evaluations": {"epoch": [50], "test_accuracy": [accuracy]},
            }
        ]
        * 2
        for model, accuracies in table.items()
        for column, accuracy in zip(columns, accuracies, strict=True)
    }
    for module in (table_1, table_1_batch, table_1_delay):
        assert module.judge(Results(runs)).judgement.verdict is Verdict.HOLDS


def test_early_losses_are_of_the_first_fifth():
    losses = [4.0, 2.0, *[1.0] * 8]
    runs = [{"has_diverged": has_diverged, "evaluations": {"train_loss": losses}} for has_diverged in (False, True)]
    assert figure_5c.early_losses(Results({"arm": runs}))["arm"].tolist() == pytest.approx([3.0, math.log(10)])


def test_a_hidden_mean_costs_no_speed():
    # tau = 8 steps of 1 s and means of 3 s: d = 1 leaves 2 s, and d = 4 nothing.
    results = section_3_3.pretend(True)
    rows = section_3_3.judge(results).rows
    assert [row[0] for row in rows] == ["d = 1", "d = 4"]
    assert [[cell.split()[0] for cell in row[1:]] for row in rows] == [
        ["0.33", "0.33", "0.80", "0.80"],
        ["1.00", "1.00", "1.00", "1.00"],
    ]
