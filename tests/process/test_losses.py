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


@pytest.mark.parametrize("ranks", [[0], [2]])
def test_a_rank_that_fails_leaves_alone(tmp_path, ranks):
    result = lose(tmp_path / "run", "hpcavg.feed:Feed.next", ranks, "--time", 50, "--fails")
    assert result.status == 0, result.err
    assert result.err.count("told to fail in next") == 1
    assert f"lost rank {ranks[0]}; 2 learners went on" in result.out


def test_where_all_fail_the_status_tells(tmp_path):
    result = lose(tmp_path / "run", "hpcavg.feed:Feed.next", [0, 1, 2], "--time", 50, "--fails")
    assert result.status == 1
    assert result.err.count("told to fail in next") == 3
