"""The thread that takes blocking means: it ends with the program, and ends the job when it fails."""

import pytest

from tests.process.launch import run

pytestmark = pytest.mark.process

PROGRAM = "tests.process.blocking_means"


@pytest.mark.parametrize("how", ["wait", "leave"])
def test_a_program_ends_with_its_means_awaited_or_not(how):
    result = run(2, [how], module=PROGRAM, is_warm=False)
    assert (result.status, result.err) == (0, "")


def test_a_failure_in_the_thread_ends_the_job_and_says_why():
    result = run(2, ["fail"], module=PROGRAM, is_warm=False)
    assert result.status != 0
    assert "hpcavg: rank 1 failed; the job is ended" in result.err
    assert "TypeError: 'NoneType' object is not callable" in result.err
