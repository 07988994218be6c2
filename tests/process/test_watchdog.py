"""One of four ranks does not come to a mean: the others name it, and say what it does."""

import re

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process

PROGRAM = "tests.process.hanging"


def reported(result):
    """Return the lines of the report, which comes once."""
    lines = [line for line in result.err.splitlines() if line.startswith("hpcavg: hung: rank")]
    lines = [line for line in lines if " is here, " not in line]
    assert sum("waiting in the" in line for line in lines) == 1, result.err
    return lines


@pytest.mark.parametrize("rank", [0, 2])
def test_a_stopped_rank_is_named_in_time(rank):
    result = run(4, ["stopped", "--rank", rank, "--timeout", 2], module=PROGRAM)
    first, second = reported(result)
    # Who reports is the first to have waited too long: another learner of its group, or a learner of the other.
    found = re.fullmatch(r"hpcavg: hung: .* waiting in the .* mean of step 3 for (.*) s; missing: rank (.)", first)
    assert found, first
    assert int(found[2]) == rank
    assert 2 <= float(found[1]) < 2 + 3
    assert re.fullmatch(rf"hpcavg: hung: rank {rank} \(process \d+ on \S+\) does not answer: stopped, .*", second)
    assert result.status == 3
    assert " is here, " not in result.err


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_rank_that_is_alive_says_where_it_is(scope):
    result = run(4, ["asleep", "--rank", 1, "--scope", scope, "--timeout", 1], module=PROGRAM)
    first, second = reported(result)
    assert first.endswith("missing: rank 1")
    assert re.search(r"rank 1 \(process \d+ on \S+\) is alive, in step 3 for \d+.\d s; see its stacks", second)
    assert result.err.count("hpcavg: hung: rank 1 is here, while others wait in the ") == 1
    assert re.search(r'hanging.py", line \d+ in sleep_too_long', result.err)
    assert result.status == 3


def test_a_rank_that_is_slow_and_comes_in_time_is_no_news():
    result = run(4, ["slow", "--timeout", 2], module=PROGRAM)
    assert (result.status, result.err) == (0, "")


def test_a_report_repeats_as_long_as_the_hang_lasts():
    result = run(4, ["asleep", "--rank", 3, "--timeout", 1, "--act", "report", "--seconds", 6], module=PROGRAM)
    assert result.status == 0
    assert 2 <= result.err.count("missing: rank 3") <= 6


def test_hung_ranks_can_be_killed():
    """The launcher then ends the job; with --with-ft ulfm the others would go on."""
    result = run(4, ["stopped", "--timeout", "1", "--act", "kill"], module=PROGRAM)
    assert result.status == 128 + 9
    assert "missing: rank 2" in result.err
    assert result.wall_s < 15


@pytest.mark.parametrize(("how", "rank"), [("fetch", 1), ("push", 1), ("answer", 2)])
def test_who_stops_in_an_exchange_with_a_server_is_named(how, rank):
    """Messages are so large that the other side has to take them."""
    result = run(3, [how], module="tests.process.stalled")
    first, second = reported(result)
    assert first.endswith(f"; missing: rank {rank}")
    assert re.search(r"rank . \(process \d+ on \S+\) does not answer: ", second)
    assert result.status == 1


def test_the_watchdog_is_told_of_every_wait():
    result = run(3, [], module="tests.process.telling")
    assert result.status == 0, result.err
    assert "untold" not in result.out, result.out
    assert result.out.count("'allgather': ") == 3


def test_idle_threads_cost_next_to_nothing():
    result = run(4, ["quiet"], module=PROGRAM)
    shares = [float(line.split()[1].rstrip("%")) for line in result.out.splitlines()]
    assert len(shares) == 4
    assert max(shares) < 1
