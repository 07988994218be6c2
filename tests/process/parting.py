"""A pause that is asked for and agreed on while a rank dies: the survivors make it all the same, after the same step.

python parting.py together|half-told
"""

import os
import signal
import sys
import time

from mpi4py import MPI

from hpcavg import recovery
from hpcavg.pauses import Kind, Pause, Pauses
from hpcavg.watchdog import watch_over

LAST = 2
REQUEST = (Kind.STOP, "SIGTERM")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def agree_together(pauses, topology):
    """Rank 2 dies between the exchange of what is asked for and the word that all have it."""
    if topology.origin == LAST:
        nothing = Pause(Kind.NOTHING, "")
        topology.carry_out(lambda: (topology.world.allreduce(nothing, MPI.MAX), die()), what="agreement on a pause")
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
            topology.carry_out(topology.world.Barrier)
        pause = pauses.end_step(step)
    return pause, step


def main(case):
    topology = recovery.SurvivingTopology()
    supervisor = watch_over(topology, 20.0).supervisor
    pauses = Pauses(supervisor, topology, by_step=case == "half-told")
    topology.carry_out(topology.world.Barrier)
    made = (agree_by_step if case == "half-told" else agree_together)(pauses, topology)
    all_made = topology.carry_out(lambda: topology.world.allgather(made))
    assert all_made == [made] * topology.num_learners, all_made
    print(topology.num_learners, *made[0], flush=True)
    topology.free()
    os._exit(0)  # MPI would wait for the dead


main(sys.argv[1])
