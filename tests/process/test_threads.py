"""Exceptions that are not the training's: in threads of others, and at a prompt."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hpcavg
from tests.process.launch import environment, run

pytestmark = pytest.mark.process

ERROR = "OSError: cannot write events.log"
PROMPT = """
import torch, hpcavg
topology = hpcavg.Topology()
mdoel
print("went on")
"""


def of(case, ranks):
    # One rank alone ends as Python does.
    return run(ranks, [case], timeout=120, module="tests.process.threads", is_warm=ranks > 0)


@pytest.mark.parametrize(
    ("case", "says"), [("other", f"rank 1 goes on; its thread a writer failed\n|{ERROR}"), ("prompt", "NameError")]
)
def test_the_training_goes_on(case, says):
    result = of(case, 2)
    assert result.status == 0, result.err
    assert sorted(result.out.splitlines()) == ["rank 0 finished", "rank 1 finished"]
    assert all(part in result.err for part in says.split("|")), result.err
    assert result.err.count("Traceback") == 1


@pytest.mark.parametrize("case", ["own", "training"])
def test_a_thread_that_others_wait_for_ends_the_job(case):
    result = of(case, 2)
    assert result.status == 1, result.err
    assert "hpcavg: rank 1 failed; the job is ended\n" in result.err
    assert result.err.count(ERROR) == 1
    assert "finished" not in result.out
    assert result.wall_s < 60


def test_all_own_threads_are_known_by_their_names():
    calls = [
        call
        for path in Path(hpcavg.__file__).parent.rglob("*.py")
        for call in ast.walk(ast.parse(path.read_text()))
        if isinstance(call, ast.Call) and getattr(call.func, "attr", None) == "Thread"
    ]
    names = [keyword.value.value for call in calls for keyword in call.keywords if keyword.arg == "name"]
    assert len(names) == len(calls) >= 3
    assert all(name.startswith("hpcavg ") for name in names)


# -- one rank alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "status", "out"), [("other", 0, "rank 0 finished\n"), ("main", 1, "")])
def test_one_rank_alone_ends_as_python_does(case, status, out):
    result = of(case, 0)
    assert (result.status, result.out) == (status, out), result.err
    assert ERROR in result.err
    assert "hpcavg: rank" not in result.err


def test_a_typing_error_ends_no_session():
    session = subprocess.run(
        [sys.executable, "-i", "-q"], input=PROMPT, capture_output=True, text=True, timeout=120, env=environment()
    )
    assert session.returncode == 0, session.stderr
    assert "NameError: name 'mdoel'" in session.stderr
    assert "went on" in session.stdout
