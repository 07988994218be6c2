"""Ranks that die at chosen places, under ``--on-failure shrink``: the others go on, and the status is theirs."""

import json

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process

QUICK = ["--on-failure", "shrink", "--algorithm", "k-avg", "--epochs", "3", "--check-rounds", "1"]


def lose(folder, where, ranks, *more, num_ranks=3):
    arguments = ["--where", where, "--ranks", *ranks, *more, "--", *QUICK, "--output", folder]
    return run(num_ranks, arguments, timeout=90, module="tests.process.dying", flags=["--with-ft", "ulfm"])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_death_before_records_are_flushed(tmp_path, rank):
    result = lose(tmp_path / "run", "hpcavg.metrics:Recorder.flush", [rank])
    assert result.status == 0, result.err
    assert result.out.count(f"lost rank {rank}; 2 learners went on") == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["completed"]
