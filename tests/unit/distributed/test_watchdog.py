"""Who is missing, going by the answers, and how it is said."""

import math
import time
from types import SimpleNamespace

import pytest
from mpi4py import MPI

from hpcavg.distributed.supervisor import Process, Supervisor, Wait
from hpcavg.distributed.watchdog import Answer, Watch, Watchdog, missing_ranks, report

LOCAL, GLOBAL = Wait("local mean", 28, (2, 3), 0.0), Wait("global mean", 32, (0, 1, 2, 3), 0.0)
PROCESSES = [Process("node0", 100, 1), Process("node0", 101, 1), Process("node1", 100, 1), Process("node1", 101, 1)]


def test_the_rank_to_blame_is_the_one_that_others_wait_for():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(LOCAL, 28, 10.0)}
    assert missing_ranks(answers, 5.0) == ([3], 0.0)
    answers[3] = Answer(None, 27, 20.0)
    assert missing_ranks(answers, 5.0) == ([3], 0.0)


def test_where_all_wait_in_different_places_all_are_missing():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(LOCAL, 28, 10.0)}
    answers[3] = Answer(LOCAL, 28, 10.0)
    assert missing_ranks(answers, 5.0) == ([2, 3], 0.0)
    assert missing_ranks({rank: Answer(GLOBAL, 32, 9.0) for rank in range(4)}, 5.0) == ([], 0.0)


def test_a_rank_that_gets_on_is_slow_and_not_hung():
    """Whether it takes a step, or waits in a mean that comes before: for rank 3 here, which is slow, too."""
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(LOCAL, 28, 10.0)}
    answers[3] = Answer(None, 27, 3.0)
    assert missing_ranks(answers, 5.0) == ([], 2.0)
    answers[2], answers[3] = Answer(LOCAL, 28, 1.0), Answer(None, 27, 1.5)
    assert missing_ranks(answers, 5.0) == ([], 3.5)


def test_a_slow_rank_is_not_named_along_with_a_hung_one():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(None, 30, 1.0), 2: Answer(LOCAL, 28, 10.0)}
    assert missing_ranks(answers, 5.0) == ([3], 0.0)


# Learners 0 and 1, server 2.
EXCHANGE, SERVICE = Wait("exchange with the servers", None, range(2, 3), 0.0), Wait("service", None, (0, 1), 0.0)


def test_a_server_that_waits_for_learners_is_not_hung_and_they_are_only_if_they_do_not_get_on():
    answers = {
        0: Answer(None, 5, 4.0),
        1: Answer(Wait("evaluation", None, (0, 1), 0.0), 6, 1.0),
        2: Answer(SERVICE, 0, 9.0),
    }
    assert missing_ranks(answers, 5.0) == ([], 1.0)
    answers[0] = Answer(None, 5, 6.0)
    assert missing_ranks(answers, 5.0) == ([0], 0.0)
    del answers[0]
    assert missing_ranks(answers, 5.0) == ([0], 0.0)


def test_who_keeps_a_server_waiting_is_to_blame_for_those_that_wait_for_the_server():
    sending = Wait("exchange with a learner", None, (1,), 0.0)
    assert missing_ranks({0: Answer(EXCHANGE, 5, 8.0), 2: Answer(sending, 0, 8.0)}, 5.0) == ([1], 0.0)
    assert missing_ranks({0: Answer(EXCHANGE, 5, 8.0), 1: Answer(EXCHANGE, 5, 7.0)}, 5.0) == ([2], 0.0)


def test_the_report_names_who_waits_and_who_is_missing():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(None, 27, 20.0)}
    assert report(GLOBAL, 9.0, [2, 3], answers, PROCESSES).splitlines() == [
        "hpcavg: hung: ranks 0-1 waiting in the global mean of step 32 for 9.0 s; missing: ranks 2-3",
        "hpcavg: hung: rank 2 (process 100 on node1) is alive, in step 27 for 20.0 s; see its stacks",
        "hpcavg: hung: rank 3 (process 101 on node1) does not answer: stopped, swapped out, in code that holds"
        " Python's lock, at its end, or its node is gone",
    ]


def test_a_mean_that_all_have_come_to_names_nobody():
    answers = {rank: Answer(GLOBAL, 32, 9.0) for rank in (0, 1, 3)} | {2: Answer(GLOBAL, 32, 9.0)}
    assert report(GLOBAL, 9.0, [], answers, PROCESSES) == (
        "hpcavg: hung: ranks 0-3 waiting in the global mean of step 32 for 9.0 s; all have arrived, yet it is not done"
    )


def test_ranks_that_wait_for_each_other_are_told_where_they_wait():
    answers = {
        0: Answer(GLOBAL, 32, 9.0),
        1: Answer(GLOBAL, 32, 8.0),
        2: Answer(LOCAL, 28, 10.0),
        3: Answer(LOCAL, 28, 9.0),
    }
    assert report(GLOBAL, 9.0, [0, 1, 2, 3], answers, PROCESSES).splitlines()[::3] == [
        "hpcavg: hung: ranks 0-1 waiting in the global mean of step 32 for 9.0 s; waiting in other calls: ranks 2-3",
        "hpcavg: hung: rank 2 (process 100 on node1) waits in the local mean of step 28 for 10.0 s",
    ]


@pytest.fixture
def supervisor():
    supervisor = Supervisor(MPI.COMM_SELF)
    yield supervisor
    supervisor.close()


def look(watchdog, supervisor, times):
    with supervisor.changed:  # its own thread may not look meanwhile
        return [watchdog.poll(now) for now in times]


def test_the_time_that_a_job_was_suspended_is_nobodys_waiting(supervisor):
    watchdog, now = Watchdog(supervisor, 10.0), time.monotonic()
    with supervisor.waiting("global mean", 3, (0,)):
        seconds = look(watchdog, supervisor, [now + 1, now + 1000, now + 1000.5])
    assert seconds == pytest.approx([9, 10 - 1 - 5, 10 - 1 - 5.5], abs=0.1)


def test_a_thread_that_looks_seldom_tells_of_a_hang_all_the_same(supervisor):
    watchdog, now = Watchdog(supervisor, 10.0), time.monotonic()
    with supervisor.waiting("global mean", 3, (0,)):
        seconds = look(watchdog, supervisor, [now + 8, now + 16, now + 24])
    assert seconds == pytest.approx([5, 0, 2.5], abs=0.1)


def test_who_is_cut_off_by_a_death_tells_how_long_the_recovery_lasts(supervisor, capfd):
    acted = []
    watchdog, now = Watchdog(supervisor, 2.0, acted.append), time.monotonic()
    with supervisor.changed:
        supervisor.is_quiet = True
        assert watchdog.poll(now) == math.inf
        with supervisor.waiting("recovery from a death", None, ()):
            assert watchdog.poll(now + 1) == pytest.approx(1, abs=0.1)
            watchdog.poll(now + 2.5)
    while not acted:
        time.sleep(0.01)
    supervisor.is_quiet = False
    assert acted == [[]]
    assert "hung: rank 0 waiting in the recovery from a death for 2.5 s; " in capfd.readouterr().err


def test_a_rank_that_is_missed_after_it_was_killed_ends_the_job():
    """MPI may take no notice of the death."""
    ended, killed = [], []
    watch = Watch.__new__(Watch)
    watch._topology, watch._killed = SimpleNamespace(survives=True), set()
    watch._watchdog = SimpleNamespace(kill=lambda ranks: killed.append(ranks) or [])
    watch._end = lambda: ended.append(True)
    watch._on_hang([1])
    watch._on_hang([1, 2])
    assert (killed, ended) == ([[1], [1, 2]], [])
    watch._on_hang([1])
    assert (len(killed), ended) == (2, [True])
