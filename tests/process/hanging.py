"""A program of 4 ranks in 2 groups, one of which does not come to the mean of step 3 in one way or another."""

import argparse
import os
import signal
import time

from mpi4py import MPI

from hpcavg import Topology
from hpcavg.algorithms.scope import GLOBAL, LOCAL
from hpcavg.distributed.supervisor import Supervisor
from hpcavg.distributed.watchdog import Watchdog

parser = argparse.ArgumentParser()
parser.add_argument("how", choices=["stopped", "asleep", "slow", "quiet"])
parser.add_argument("--rank", type=int, default=2)
parser.add_argument("--scope", choices=["local", "global"], default="global")
parser.add_argument("--timeout", type=float, default=2.0)
parser.add_argument("--act", choices=["abort", "kill", "report"], default="abort")
parser.add_argument("--seconds", type=float, default=30.0, help="how long the rank sleeps")
options = parser.parse_args()

topology = Topology(group_size=2)
supervisor = Supervisor(topology.all_ranks)


def act(missing):
    if options.act == "abort":
        MPI.COMM_WORLD.Abort(3)
    elif options.act == "kill":
        assert watchdog.kill(missing) == []


watchdog = Watchdog(supervisor, options.timeout, act)
groups = {"local": topology.ranks_of(LOCAL), "global": topology.ranks_of(GLOBAL)}


def sleep_too_long():
    time.sleep(options.seconds)


topology.learner_ranks.Barrier()
cpu_s = time.process_time()
for step in range(1, 6):
    supervisor.step, supervisor.step_since = step, time.monotonic()
    if step == 3 and topology.rank == options.rank:
        if options.how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif options.how == "asleep":
            sleep_too_long()
        elif options.how == "slow":
            time.sleep(0.7 * options.timeout)
    if options.how == "quiet" and step == 3:
        time.sleep(5)
        print(f"CPU {100 * (time.process_time() - cpu_s) / 5:.2f}%", flush=True)
    with supervisor.waiting("local mean", step, groups["local"]):
        topology.local.Barrier()
    if options.scope == "global" or step > 3:
        with supervisor.waiting("global mean", step, groups["global"]):
            topology.learner_ranks.Barrier()
supervisor.close()
