"""What comes of every synchronous algorithm where /dev/shm is short, by engine auto and by engine mpi.

python -m tests.cluster.short_memory MEGABYTES rules|shrink

Rank 0 prints a line of JSON for each case. With `shrink` the last rank dies in the middle.
"""

import gc
import json
import os
import signal
import sys
import warnings

import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, Topology, algorithms
from hpcavg.distributed.shrinking import SurvivingTopology, finalize, is_enabled
from hpcavg.training.eager import defer_compiler_import
from tests.mpi.nodes import Nodes

STEPS = 8
DEATH = 5  # a step after which nothing is on its way
DASGD = [("dasgd", {"tau": 3, "delay": 1, "xi": 0.25}), ("dasgd", {"tau": 2, "delay": 1, "xi": 0.5})]
DISTANCE = {"measure_distance": True}
RULES = [
    ("sync_sgd", {}, {}),
    ("sync_sgd", {"variant": "gradients"}, {}),
    ("one_shot", {}, {}),
    ("k_avg", {"k": 2}, {}),
    ("k_avg", {"k": 2}, DISTANCE),
    ("k_avg", {"k": 4}, {"optimizer_state": "average"}),
    ("hier_avg", {"k1": 1, "k2": 3}, DISTANCE),
    ("post_local_sgd", {"switch_step": 2, "k": 2}, {}),
    ("pr_sgd", {"interval": 3}, {}),
    ("pr_sgd_time_varying", {}, {}),
    ("pr_sgd_hetero", {"local_steps": [2, 4]}, {}),
    ("lupa", {"tau": 3}, {}),
    ("ada_lupa", {"tau0": 2}, {}),
    ("slowmo", {"k": 3}, {}),
    ("diloco", {"h": 3}, {}),
    ("dasgd", {"tau": 3, "delay": 0, "xi": 0.25}, {}),
    (*DASGD[0], {}),
]


class Problem(nn.Module):
    """A vector of so many megabytes, another of another dtype, a buffer; every learner has a parabola of its own."""

    def __init__(self, megabytes, learner):
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, int(megabytes * 1e6 / 4)))
        self.y = nn.Parameter(torch.linspace(0, 1, 1001, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(5))
        self.minimum = float(learner)

    def take_gradients(self):
        """Leave the gradients of the parabola; learners differ in curvature, so that every mean makes a difference."""
        with torch.no_grad():
            self.seen += 1 + self.minimum
            for parameter in self.parameters():
                parameter.grad = (1 + self.minimum) * (parameter.detach() - self.minimum)

    def loss(self):
        """Return the parabola of learner 0."""
        return sum(float(tensor.detach().double().square().mean()) for tensor in (self.x, self.y))


def make(topology, megabytes, engine, rule, options, more):
    model = Problem(megabytes, topology.rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25, momentum=0.5)
    built = algorithms.build(rule, options)
    return Averager(model, optimizer, built, topology, engine=engine, total_steps=STEPS, buffers="average", **more)


def train(topology, megabytes, engine, cases, dies=False):
    """Train by all of `cases` in turns; return the loss, distance and hash of each, and how often rank 0 was warned."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        averagers = [make(topology, megabytes, engine, *case) for case in cases]
        while left := [averager for averager in averagers if not averager.done]:
            for averager in left:
                averager.model.take_gradients()
                averager.step()
            if dies and left[0].progress.step == DEATH:
                topology.learner_ranks.Barrier()
                if topology.rank == topology.num_learners - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
        for averager in averagers:
            averager.finish()
    told = [str(each.message) for each in caught if "engine='mpi'" in str(each.message)]
    found = []
    for averager in averagers:
        distances = [event.consensus_distance for event in averager.events]
        bits = hash(b"".join(t.numpy().tobytes() for t in averager.model.state_dict().values()))
        agree = len(set(topology.learner_ranks.allgather(bits))) == 1
        found.append([averager.model.loss(), sum(d for d in distances if d == d), bits if agree else None])
    return found, len(told)


def report(name, topology, megabytes, cases, dies=False, engines=("auto", "mpi")):
    results = {}
    for engine in engines:
        results[engine], num_warnings = train(topology, megabytes, engine, cases, dies)
        results.setdefault("warnings", num_warnings)  # those of auto
        gc.collect()
    if topology.rank == 0:
        print(json.dumps({"case": name, **results}), flush=True)


def main(megabytes, what):
    defer_compiler_import()
    if what == "rules":
        topology = Topology(group_size=2)
        for rule, options, more in RULES:
            report(f"{rule} {options} {more}", topology, megabytes, [(rule, options, more)])
        report("two at a time", topology, megabytes, [(*case, {}) for case in DASGD])
        apart = Nodes(MPI.COMM_WORLD, None, "nodes of 1")
        for case in ((*DASGD[0], {}), ("k_avg", {"k": 2}, DISTANCE)):
            report(f"two nodes, {case}", apart, megabytes, [case])
        return
    assert is_enabled()
    topology = SurvivingTopology(group_size=2)
    cases = [("hier_avg", {"k1": 1, "k2": 2}, DISTANCE), (*DASGD[0], {})]
    report("shrink", topology, megabytes, cases, dies=True, engines=[what.partition("-")[2]])
    topology.free()
    finalize()
    sys.stdout.flush()
    os._exit(0)  # MPI would wait for the dead


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2])
