"""A program that takes steps of random lengths and the means of Hier-AVG, and pauses whenever it is told to.

in-turn: `count` times, requests come at random times from one, some or all ranks; what is asked for and why must be
agreed on, and made after the same step by all, before the next.
any-time: for at least `count` steps, threads of all ranks ask whenever they like, also while a pause is being agreed on
or made, and while the program ends.
signals: stop at the first signal.
deaths: like any-time, while all ranks but two are killed one after the other; needs mpirun --with-ft ulfm.
"""

import argparse
import os
import random
import signal
import threading
import time

import numpy as np
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.algorithms.scope import LOCAL
from hpcavg.distributed.preemption import PauseKind, Pauses
from hpcavg.distributed.shrinking import SurvivingTopology
from hpcavg.distributed.supervisor import Supervisor

K1, K2 = 4, 32


def take_step(step):
    if own.random() < 0.3:
        time.sleep(own.uniform(0, 0.002))
    if step % K2 == 0:
        topology.run_collective(lambda: topology.learner_ranks.Allreduce(array, means))
    elif step % K1 == 0:
        topology.run_collective(lambda: topology.local.Barrier(), LOCAL)


def pause_in_turn(num_pauses):
    pauses = Pauses(supervisor, topology)
    together = random.Random(1)
    step, waits_s = 0, []
    for number in range(num_pauses):
        num_asking = together.choice([1, 1, topology.num_learners, together.randint(1, topology.num_learners)])
        asks = topology.rank in together.sample(range(topology.num_learners), num_asking)
        wanted = (together.choice([PauseKind.CHECKPOINT, PauseKind.STOP]), f"number {number}")
        ask_s, asked_s = time.monotonic() + own.uniform(0, 0.01), None
        pause = None
        while pause is None:
            step += 1
            take_step(step)
            if asks and asked_s is None and time.monotonic() >= ask_s:
                pauses.request(*wanted)
                asked_s = time.monotonic()
            pause = pauses.end_step(step)
        assert pause == wanted, (pause, wanted)
        assert pauses.requested is PauseKind.NOTHING
        if asked_s is not None:
            waits_s.append(time.monotonic() - asked_s)
        steps = topology.learner_ranks.allgather(step)
        assert len(set(steps)) == 1, steps
    return f"{num_pauses} pauses in {step} steps, {1000 * np.median(waits_s or [0]):.1f} ms from request to pause"


def ask_at_any_time(pauses):
    def ask():
        for number in range(10**6):
            time.sleep(own.expovariate(topology.num_learners / 0.02))
            pauses.request(own.choice([PauseKind.CHECKPOINT, PauseKind.STOP]), f"{topology.rank}.{number}")

    threading.Thread(target=ask, daemon=True).start()


def pause_at_any_time(num_steps):
    pauses = Pauses(supervisor, topology)
    ask_at_any_time(pauses)
    step, made = 0, []
    while step < num_steps or len(made) < 10:  # the same on all ranks, or this hangs
        step += 1
        take_step(step)
        pause = pauses.end_step(step)
        if pause is not None:
            made.append((step, pause))
            if len(made) % 2:
                topology.learner_ranks.Barrier()
    made_by_all = topology.learner_ranks.allgather(made)
    assert made_by_all == [made] * topology.num_learners
    return f"{len(made)} pauses in {step} steps"


def pause_while_ranks_die(num_steps):
    topology.on_shrink(lambda: supervisor.move_to(topology.all_ranks))
    pauses = Pauses(supervisor, topology)
    ask_at_any_time(pauses)
    step, made = 0, []
    while topology.num_learners > 2 or step < 7 * num_steps:
        is_last = topology.num_learners > 2 and topology.rank == topology.num_learners - 1
        if is_last and step > (1 + 2 * len(topology.losses)) * num_steps:
            time.sleep(own.uniform(0, 0.1))
            os.kill(os.getpid(), signal.SIGKILL)
        step += 1
        take_step(step)
        pause = pauses.end_step(step)
        if pause is not None:
            made.append((step, pause))
            topology.run_collective(lambda: topology.learner_ranks.Barrier())
    made_by_all = topology.learner_ranks.allgather(made)
    assert made_by_all == [made] * topology.num_learners, made_by_all
    assert made
    return f"{len(made)} pauses of {topology.num_learners} ranks"


def pause_at_signals(stay):
    pauses = Pauses(supervisor, topology, catch_signals=True)
    topology.learner_ranks.Barrier()
    for step in range(1, 10**6):
        if step == 1 and topology.rank == 0:
            print("ready", flush=True)
        time.sleep(0.01)
        if step % K1 == 0:
            topology.learner_ranks.Barrier()
        pause = pauses.end_step(step)
        if pause is not None:
            steps = topology.learner_ranks.allgather(step)
            assert len(set(steps)) == 1, steps
            if topology.rank == 0:
                print(f"{pause.kind.name} {pause.reason}", flush=True)
            if stay:
                time.sleep(60)
            return "end"
    return "never"


parser = argparse.ArgumentParser()
parser.add_argument("mode", choices=["in-turn", "any-time", "deaths", "signals"])
parser.add_argument("--count", type=int, default=0)
parser.add_argument("--stay", action="store_true", help="sleep when a signal has stopped the run")
parser.add_argument("--name", help="by which a test finds this program's processes")
options = parser.parse_args()
kind = SurvivingTopology if options.mode == "deaths" else Topology
topology = kind(group_size=min(2, MPI.COMM_WORLD.Get_size()))
supervisor = Supervisor(topology.all_ranks)
own = random.Random(2 + topology.rank)
array, means = np.ones(1000), np.empty(1000)
modes = {"in-turn": pause_in_turn, "any-time": pause_at_any_time, "deaths": pause_while_ranks_die}
line = pause_at_signals(options.stay) if options.mode == "signals" else modes[options.mode](options.count)
supervisor.close()
if topology.rank == 0:
    print(line, flush=True)
if options.mode == "deaths":
    topology.learner_ranks.Barrier()
    os._exit(0)  # Open MPI's finalisation sometimes waits for the dead
