"""The command ``paper``: killed and started again, on other numbers of ranks, with runs that fail, with bad input."""

import os
import re
import signal

import pytest

from tests.process import launch

# Two arms with three seeds.
RUNS = 6

pytestmark = pytest.mark.process


def paper(ranks, *arguments):
    return launch.run(ranks, ["paper", *arguments], module="tests.process.papers", timeout=120)


def finished(cache):
    """Return the files of finished runs, and what tells whether they were written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in cache.glob("*.json")}


def test_a_table_does_not_depend_on_the_ranks(tmp_path):
    pages = []
    for ranks, per_run in ((2, 1), (4, 2)):
        page, cache = tmp_path / str(ranks) / "papers.md", tmp_path / str(ranks) / "cache"
        where = ["--page", page, "--cache", cache, "--seeds", 2, "--ranks-per-run", per_run]
        result = paper(ranks, "k-avg-small", *where)
        assert (result.status, result.err) == (0, "")
        assert result.out.startswith("4 runs to carry out\nk-avg-small")
        assert len(finished(cache)) == 4
        assert list((cache / "under-way").iterdir()) == []
        pages.append(page.read_text())
    assert pages[0] == pages[1]
    assert re.search(r"^\| K = 16 \| \d\d\.\d ± \d", pages[0], re.MULTILINE)


def test_a_killed_job_loses_no_more_than_the_runs_under_way(tmp_path):
    arguments = ["paper", "k-avg-long", "--cache", tmp_path, "--seeds", 3]
    process = launch.start(2, arguments, module="tests.process.papers")
    launch.wait_for(lambda: len(finished(tmp_path)) >= 2, process)
    before = finished(tmp_path)
    os.kill(launch.pid_of_rank(tmp_path, 1), signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    kept = finished(tmp_path)
    assert before.items() <= kept.items()
    assert len(kept) < RUNS, "the job was over too early for this test"
    result = paper(2, *arguments[1:])
    assert (result.status, result.err) == (0, "")
    left = RUNS - len(kept)
    assert result.out.startswith(f"{left} run{'s' * (left > 1)} to carry out\n")
    assert kept.items() <= finished(tmp_path).items()
    assert len(finished(tmp_path)) == RUNS
    assert list((tmp_path / "under-way").iterdir()) == []
    again = paper(2, *arguments[1:])
    assert (again.status, again.out) == (0, result.out.partition("\n")[2])


def test_the_list_is_printed_once():
    result = launch.run(2, ["paper", "--list"])
    assert (result.status, result.err) == (0, "")
    assert result.out.count("\nk-avg-figure-1 ") == 1


def test_a_run_that_fails_ends_the_job_and_is_named(tmp_path):
    result = paper(2, "k-avg-failing", "--cache", tmp_path, "--seeds", 2)
    assert result.status == 1
    why = r"the run training:train with .*learning_rate=-1, .*seed=[01] failed: learning_rate=-1.0: must be a positive"
    assert re.search(rf"^RuntimeError: {why}.*$", result.err, re.MULTILINE), result.err
    assert finished(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--ranks-per-run", "3"], "--ranks-per-run 3: must be a divisor of the number of ranks, 2"),
        (["--cache", __file__], f"--cache {__file__}: must be a folder that can be written"),
        (["k-avg-huge"], "k-avg-huge: neither an experiment nor a paper; near it: k-avg-"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, line):
    cache = [] if "--cache" in arguments else ["--cache", tmp_path / "cache"]
    result = paper(2, *arguments, *cache)
    assert (result.status, len(result.own_lines)) == (2, 1), result.err
    assert result.own_lines[0].startswith(f"hpcavg: error: {line}")
