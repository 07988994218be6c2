"""A collective that a death makes fail with an exception of no MPI's, on one rank or on all that are left.

python garbled.py one|all|mistake
"""

import os
import signal
import sys

from hpcavg.distributed import shrinking


def main(case):
    topology = shrinking.SurvivingTopology()
    shrinking.install_leave_hook(topology)
    attempts = []

    def act():
        attempts.append(topology.num_learners)
        if len(attempts) == 1:
            if topology.origin == 2 and case != "mistake":
                os.kill(os.getpid(), signal.SIGKILL)
            if case == "all" or topology.origin == 0:
                raise ValueError("made of what a dead rank left")
        return sorted(topology.all_ranks.allgather(topology.origin))

    print(topology.run_collective(act), attempts, flush=True)
    topology.free()
    os._exit(0)  # MPI would wait for the dead


main(sys.argv[1])
