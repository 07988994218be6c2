"""A short soak of ``--on-failure shrink``: ranks die in means, and the others go on. See `benchmarks.soak`."""

import argparse

import pytest

from benchmarks import soak
from benchmarks.soak import Kill, Outcome
from tests.process.launch import environment, mpirun

pytestmark = pytest.mark.process

HIER_AVG = [
    Kill(0, "local average: half", 24),
    Kill(3, "flush of records: before", 70),
    Kill(2, "summary: leaving", 120),
]
DASGD = [
    Kill(1, "start of a delayed average: before", 20),
    Kill(4, "recovery: split", 10),
    Kill(0, "delayed average on its way: half", 60),
]


@pytest.mark.parametrize(
    ("algorithm", "ranks", "group_size", "kills"), [("hier-avg", 4, 2, HIER_AVG), ("dasgd", 5, 3, DASGD)]
)
def test_survivors_go_on_and_agree(algorithm, ranks, group_size, kills, tmp_path, monkeypatch):
    for name, value in environment(MPIRUN=mpirun()).items():
        monkeypatch.setenv(name, value)
    options = argparse.Namespace(steps=120, deadline=120.0, at_least=0.9)
    run = Outcome(algorithm, soak.arguments(algorithm, group_size, "auto", options.steps), ranks, kills)
    soak.carry_out(run, tmp_path, options)
    assert not run.faults, "\n".join(run.faults)
    assert run.steps == run.steps_due == run.num_survivors * options.steps
