"""A program that takes steps of random lengths and the means of Hier-AVG, and pauses whenever it is told to.

in-turn: `count` times, requests come at random times from one, some or all ranks; what is asked for and why must be
agreed on, and made after the same step by all, before the next.
any-time: for `count` steps, threads of all ranks ask whenever they like, also while a pause is being agreed on or made,
and while the program ends.
signals: stop at the first signal.
"""

import argparse
import random
import threading
import time

import numpy as np
from mpi4py import MPI

from hpcavg import Topology
from hpcavg.pauses import Kind, Pauses
from hpcavg.supervisor import Supervisor

K1, K2 = 4, 32

topology = Topology(group_size=min(2, MPI.COMM_WORLD.Get_size()))
supervisor = Supervisor(topology.everyone)
own = random.Random(2 + topology.rank)
array = np.ones(1000)


def take_step(step):
    if own.random() < 0.3:
        time.sleep(own.uniform(0, 0.002))
    if step % K2 == 0:
        topology.world.Allreduce(MPI.IN_PLACE, array)
    elif step % K1 == 0:
        topology.local.Barrier()


def pause_in_turn(num_pauses):
    pauses = Pauses(supervisor)
    together = random.Random(1)
    step, waits_s = 0, []
    for number in range(num_pauses):
        num_asking = together.choice([1, 1, topology.num_learners, together.randint(1, topology.num_learners)])
        asks = topology.rank in together.sample(range(topology.num_learners), num_asking)
        wanted = (together.choice([Kind.CHECKPOINT, Kind.STOP]), f"number {number}")
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
        assert pauses.requested is Kind.NOTHING
        if asked_s is not None:
            waits_s.append(time.monotonic() - asked_s)
        steps = topology.world.allgather(step)
        assert len(set(steps)) == 1, steps
    return f"{num_pauses} pauses in {step} steps, {1000 * np.median(waits_s or [0]):.1f} ms from request to pause"


def pause_at_any_time(num_steps):
    pauses = Pauses(supervisor)

    def ask():
        for number in range(10**6):
            time.sleep(own.expovariate(topology.num_learners / 0.02))
            pauses.request(own.choice([Kind.CHECKPOINT, Kind.STOP]), f"{topology.rank}.{number}")

    threading.Thread(target=ask, daemon=True).start()
    made = []
    for step in range(1, num_steps + 1):
        take_step(step)
        pause = pauses.end_step(step)
        if pause is not None:
            made.append((step, pause))
            if len(made) % 2:
                topology.world.Barrier()
    made_by_all = topology.world.allgather(made)
    assert made_by_all == [made] * topology.num_learners
    assert len(made) > num_steps / 100, len(made)
    return f"{len(made)} pauses in {num_steps} steps"


def pause_at_signals(stay):
    pauses = Pauses(supervisor, catch_signals=True)
    topology.world.Barrier()
    for step in range(1, 10**6):
        if step == 1 and topology.rank == 0:
            print("ready", flush=True)
        time.sleep(0.01)
        if step % K1 == 0:
            topology.world.Barrier()
        pause = pauses.end_step(step)
        if pause is not None:
            steps = topology.world.allgather(step)
            assert len(set(steps)) == 1, steps
            if topology.rank == 0:
                print(f"{pause.kind.name} {pause.reason}", flush=True)
            if stay:
                time.sleep(60)
            return "end"
    return "never"


parser = argparse.ArgumentParser()
parser.add_argument("mode", choices=["in-turn", "any-time", "signals"])
parser.add_argument("--count", type=int, default=0)
parser.add_argument("--stay", action="store_true", help="sleep when a signal has stopped the run")
parser.add_argument("--name", help="by which a test finds this program's processes")
options = parser.parse_args()
if options.mode == "signals":
    line = pause_at_signals(options.stay)
else:
    line = {"in-turn": pause_in_turn, "any-time": pause_at_any_time}[options.mode](options.count)
supervisor.close()
if topology.rank == 0:
    print(line)
