"""A DataLoader's worker processes under MPI: however they are started, they are no ranks, and fail by themselves."""

import pytest

from tests.process.launch import run
from tests.process.workers import METHODS, STEPS

pytestmark = pytest.mark.process
PROGRAM = "tests.process.workers"


def test_workers_started_in_every_way_leave_mpi_alone():
    result = run(2, [], module=PROGRAM, timeout=90)
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].split()[0] == str(STEPS * len(METHODS))
    assert "hpcavg: rank" not in result.err
    assert result.err.count("ZeroDivisionError") == 2 * len(METHODS)
    assert result.err.count("ValueError: a child's own matter") == 2


def test_a_worker_that_raises_ends_the_job_through_its_rank():
    result = run(2, ["raise"], module=PROGRAM, timeout=90)
    assert result.status == 1
    assert result.err.count("hpcavg: rank 1 failed; the job is ended") == 1
    assert "KeyError: 'a sample is missing'" in result.err
