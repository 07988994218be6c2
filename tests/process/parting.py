"""Ranks that die at a bad moment of a pause that is asked for: the survivors make it all the same, after the same step.

python parting.py together|half-told|ordered|stopped

In the last case another rank is stopped, so that the recovery hangs, which ends the job.
"""

import os
import signal
import sys
import time

from hpcavg.distributed import shrinking
from hpcavg.distributed.preemption import PauseKind, Pauses
from hpcavg.distributed.watchdog import watch_over

LAST = 2
REQUEST = (PauseKind.STOP, "SIGTERM")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def agree_together(pauses, topology):
    """Rank 2 dies between the exchange of what is asked for and the word that all have it."""
    run_collective = topology.run_collective
    if topology.origin == LAST:
        topology.run_collective = lambda act, **options: run_collective(lambda: (act(), die()), **options)
    if topology.origin == 0:
        pauses.request(*REQUEST)
    return pauses.agree_now(), 0


def agree_by_step(pauses, topology):
    """Rank 0 dies when it has told rank 1 alone how far to go; rank 2 is held, and rank 1 goes there."""
    send_to_all = pauses._send_to_all

    def send_to_one(what, *content):
        if what == "go":
            pauses._send(1, what, *content)
            time.sleep(1.5)  # it has arrived
            die()
        send_to_all(what, *content)

    pauses._send_to_all = send_to_one
    pause, step = None, 0
    if topology.origin == 1:
        pauses.request(*REQUEST)
    while pause is None:
        step += 1
        time.sleep(0.05)
        if step % 100 == 0:
            topology.run_collective(lambda: topology.learner_ranks.Barrier())
        pause = pauses.end_step(step)
    return pause, step


def agree_without_one_that_is_ordered_to_leave(pauses, topology):
    """Rank 2 gets a second SIGTERM; so does the run a first one thereby, through the others."""
    if topology.origin == LAST:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    if topology.origin == 0:
        pauses.request(*REQUEST)
    topology.run_collective(lambda: topology.learner_ranks.Barrier())
    return pauses.agree_now(), 0


def hang_in_recovery(pauses, topology):
    """Rank 2 is stopped, and rank 1 dies before anybody has missed it."""
    if topology.origin == LAST:
        os.kill(os.getpid(), signal.SIGSTOP)
    if topology.origin == 1:
        time.sleep(0.5)
        die()
    topology.run_collective(lambda: topology.learner_ranks.Barrier())
    return None, 0


CASES = {
    "together": agree_together,
    "half-told": agree_by_step,
    "ordered": agree_without_one_that_is_ordered_to_leave,
    "stopped": hang_in_recovery,
}


def main(case):
    topology = shrinking.SurvivingTopology(group_size=1, learners_per_rank=2)
    supervisor = watch_over(topology, 2.0 if case == "stopped" else 20.0).supervisor
    pauses = Pauses(supervisor, topology, catch_signals=True, by_step=case == "half-told")
    topology.run_collective(lambda: topology.learner_ranks.Barrier())
    made = CASES[case](pauses, topology)
    all_made = topology.run_collective(lambda: topology.learner_ranks.allgather(made))
    assert all_made == [made] * topology.num_learner_ranks, all_made
    origins = topology.learner_ranks.allgather(topology.origin)
    # A dead rank takes its learners along; the others get new numbers, and keep their groups.
    assert topology.num_learners == topology.losses[-1].num_learners == 4
    assert list(topology.learners) == [2 * topology.rank, 2 * topology.rank + 1]
    assert topology.group_sizes == {2 * origin + row: 1 for origin in origins for row in range(2)}
    assert topology.groups_here == [slice(0, 1), slice(1, 2)]
    print(topology.num_learner_ranks, *made[0], flush=True)
    topology.free()
    os._exit(0)  # MPI would wait for the dead


main(sys.argv[1])
