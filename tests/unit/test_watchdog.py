"""Who is missing, going by the answers, and how it is said."""

from hpcavg.supervisor import Process, Wait
from hpcavg.watchdog import Answer, is_under_way, missing_ranks, report

LOCAL, GLOBAL = Wait("local mean", 28, (2, 3), 0.0), Wait("global mean", 32, (0, 1, 2, 3), 0.0)
PROCESSES = [Process("node0", 100, 1), Process("node0", 101, 1), Process("node1", 100, 1), Process("node1", 101, 1)]


def test_the_rank_to_blame_is_the_one_that_others_wait_for():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(LOCAL, 28, 10.0)}
    assert missing_ranks(GLOBAL, answers) == missing_ranks(LOCAL, answers) == [3]
    answers[3] = Answer(None, 27, 20.0)
    assert missing_ranks(GLOBAL, answers) == missing_ranks(LOCAL, answers) == [3]


def test_where_all_wait_those_elsewhere_are_missing():
    answers = {0: Answer(GLOBAL, 32, 9.0), 1: Answer(GLOBAL, 32, 8.0), 2: Answer(LOCAL, 28, 10.0)}
    answers[3] = Answer(LOCAL, 28, 10.0)
    assert missing_ranks(GLOBAL, answers) == [2, 3]
    assert missing_ranks(LOCAL, answers) == []


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


def test_a_rank_that_takes_steps_is_not_hung():
    assert is_under_way(Answer(None, 27, 1.9), 2.0)
    assert not is_under_way(Answer(None, 27, 2.1), 2.0)
    assert not is_under_way(Answer(GLOBAL, 27, 0.1), 2.0)
    assert not is_under_way(None, 2.0)
