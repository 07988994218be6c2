"""A short soak of ``--on-failure shrink``: ranks die in means, and the others go on. See `benchmarks.soak`."""

import argparse

import pytest

from benchmarks import soak
from benchmarks.soak import Kill, Outcome
from tests.process.launch import ULFM, environment, mpirun, run

pytestmark = pytest.mark.process

HIER_AVG = [
    Kill(0, "local average: half", 24),
    Kill(3, "flush of records: before", 70),
    Kill(2, "summary: leaving", 120),
]
DASGD = [
    Kill(1, "start of a delayed average: before", 20),
    Kill(4, "recovery: split", 10),
    Kill(2, "delayed average on its way: half", 60),
    Kill(0, "summary: told", 120),
]


GOSSIP = [Kill(1, "ring average: half", 20), Kill(3, "ring average: before", 60), Kill(2, "ring average: after", 80)]


@pytest.mark.parametrize(
    ("algorithm", "ranks", "group_size", "kills"),
    [("hier-avg", 4, 2, HIER_AVG), ("dasgd", 5, 3, DASGD), ("gossip", 5, 2, GOSSIP)],
)
def test_survivors_go_on_and_agree(algorithm, ranks, group_size, kills, tmp_path, monkeypatch):
    for name, value in environment(MPIRUN=mpirun()).items():
        monkeypatch.setenv(name, value)
    options = argparse.Namespace(steps=120, deadline=120.0, at_least=0.9)
    outcome = Outcome(algorithm, soak.arguments(algorithm, group_size, "auto", options.steps), ranks, kills)
    soak.run_one(outcome, tmp_path, options)
    assert not outcome.faults, "\n".join(outcome.faults)
    assert not list(tmp_path.rglob("lock-*"))  # an heir of rank 0's has it, and gives it back
    assert outcome.steps == outcome.steps_due == outcome.num_survivors * options.steps


FAILING = """
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from hpcavg.tasks import Task, digits

def loss(output, target):
    if torch.is_grad_enabled():
        raise ValueError("a mistake in the task")
    return cross_entropy(output, target)

def task(config):
    return Task("failing", lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits.load_data, loss)
"""


def test_a_job_in_which_all_ranks_fail_does_not_end_well(tmp_path):
    path = tmp_path / "task.py"
    path.write_text(FAILING)
    arguments = ["--on-failure", "shrink", "--task", f"{path}:task", "--output", tmp_path / "run", "--steps", 20]
    result = run(2, arguments, flags=ULFM)
    assert result.status == 1
    assert result.err.count("ValueError: a mistake in the task") == 2


@pytest.mark.parametrize("case", ["one", "all"])
def test_an_exception_of_any_kind_may_come_of_a_death(case):
    """MPI may end a collective with success in which somebody died; what is unpickled then is anything."""
    result = run(3, [case], module="tests.process.garbled", flags=ULFM)
    assert result.status == 0, result.err
    assert result.out.splitlines() == ["[0, 1] [3, 2]"] * 2


def test_where_nobody_died_a_mistake_is_one():
    result = run(3, ["mistake"], module="tests.process.garbled", flags=ULFM)
    assert result.out.splitlines() == ["[1, 2] [3, 2]"] * 2
    assert "rank 0 failed; the others go on without it" in result.err
    assert result.err.count("ValueError: made of what a dead rank left") == 1


def test_a_recovery_that_a_stopped_rank_keeps_from_its_end_ends_the_job():
    result = run(3, ["stopped"], module="tests.process.parting", flags=ULFM, is_warm=False)
    assert result.status == 1
    assert "hpcavg: hung: rank 0 waiting in the recovery from a death for 2." in result.err


@pytest.mark.parametrize("case", ["together", "half-told", "ordered"])
def test_survivors_make_the_pause_that_was_asked_for_before_a_death(case):
    result = run(3, [case], module="tests.process.parting", flags=ULFM)
    assert result.status == 0, result.err
    assert result.out.splitlines() == ["2 2 SIGTERM"] * 2
    assert "hung" not in result.err
