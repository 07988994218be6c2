"""Ranks at random speeds agree on the step after which they pause, whoever asks and whenever."""

import os
import signal
import threading
import time

import pytest

from tests.process.launch import ULFM, pid_of_rank, run, start

pytestmark = pytest.mark.process

PROGRAM = "tests.process.pausing"


@pytest.mark.parametrize(("ranks", "num_pauses"), [(1, 200), (2, 200), (3, 100), (4, 100), (8, 30)])
def test_every_pause_comes_after_the_same_step_on_all_ranks(ranks, num_pauses):
    result = run(ranks, ["in-turn", "--count", num_pauses], module=PROGRAM)
    assert (result.status, result.err) == (0, "")
    assert f"{num_pauses} pauses in " in result.out


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_requests_may_come_at_any_time(ranks):
    """Also while a pause is being agreed on or made, and when the program ends with an agreement under way."""
    result = run(ranks, ["any-time", "--count", 600], module=PROGRAM)
    assert (result.status, result.err) == (0, "")


def test_survivors_go_on_to_agree_when_ranks_die():
    """Three of five are killed, with agreements under way; requests made before are not lost."""
    result = run(5, ["deaths", "--count", 100], module=PROGRAM, flags=ULFM)
    assert result.status == 0, result.err
    assert "pauses of 2 ranks" in result.out


@pytest.fixture
def program(tmp_path):
    """Return a function that starts the program and waits until it takes steps."""
    processes, deadlines = [], []

    def start_it(*arguments):
        process = start(3, ["signals", "--name", tmp_path, *arguments], module=PROGRAM, is_warm=True)
        processes.append(process)
        deadlines.append(threading.Timer(60, process.kill))
        deadlines[-1].start()
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield start_it
    for deadline in deadlines:
        deadline.cancel()
    for process in processes:
        process.kill()
        process.communicate(timeout=20)


@pytest.mark.parametrize(("name", "to"), [("SIGUSR1", "launcher"), ("SIGUSR1", "rank 2"), ("SIGINT", "rank 2")])
def test_a_signal_stops_all_ranks_together(program, tmp_path, name, to):
    """SIGTERM to Open MPI's launcher kills the ranks a quarter of a second after it has reached them."""
    process = program()
    sent_s = time.monotonic()
    pid = process.pid if to == "launcher" else pid_of_rank(tmp_path, 2)
    os.kill(pid, signal.Signals[name])
    assert process.stdout.readline() == f"STOP {name}\n"
    assert process.stdout.readline() == "end\n"
    assert time.monotonic() - sent_s < 2


def test_a_second_sigterm_leaves_at_once(program, tmp_path):
    """The launcher then ends the others, whose main threads sleep for a minute."""
    process = program("--stay")
    pid = pid_of_rank(tmp_path, 2)
    os.kill(pid, signal.SIGTERM)
    assert process.stdout.readline() == "STOP SIGTERM\n"
    time.sleep(1.1)
    os.kill(pid, signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
