"""Seeded programs in which one rank makes one call too few, too many or another one. Run it on 2 to 4 ranks.

Each line tells how a program ended: `alike` (the call made no difference: all models are equal), `error` (an exception
on all learners), `alone` (an exception on some, and nobody waits for them), `DIFFERENT` (no exception, and different
models). A hang is ended, with the ranks named, by the averager. Ends after a program that leaves means under way.
"""

import argparse
import random
from itertools import count

import torch
from mpi4py import MPI
from torch import nn

from hpcavg import Averager, Topology, algorithms

NUM_STEPS = 12
RULES = {
    "sgd": {},
    "sync_sgd": {},
    "gradients": {"variant": "gradients"},
    "one_shot": {},
    "k_avg": {"k": 3},
    "hier_avg": {"k1": 2, "k2": 5},
    "post_local_sgd": {"switch_step": 4, "k": 3},
    "pr_sgd": {"interval": 3},
    "pr_sgd_time_varying": {},
    "pr_sgd_hetero": {"local_steps": [3]},
    "lupa": {"tau": 4},
    "ada_lupa": {"tau0": 2, "growth": "loss"},
    "dasgd": {"tau": 4, "delay": 2},
    "slowmo": {"k": 3},
    "diloco": {"h": 4},
    "downpour": {"n_push": 2, "n_fetch": 3},
    "eamsgd": {"tau": 2},
}
ENGINES = ("auto", "mpi", "shared", "twolevel")
CALLS = ("step", "finish", "mean_model", "state_dict", "recompute_buffers")
world = MPI.COMM_WORLD


class Program:
    """What all ranks do, and where one of them does something else."""

    def __init__(self, seed):
        own = random.Random(seed)
        self.name = own.choice(list(RULES))
        self.engine = own.choice(ENGINES)
        self.group_size = own.randint(1, world.size)
        self.is_served = self.name in ("downpour", "eamsgd")
        self.calls = ["step"] * NUM_STEPS
        for call in CALLS[2:]:
            if not (self.is_served and call == "state_dict"):
                self.calls.insert(own.randint(1, len(self.calls)), call)
        self.calls.append("finish")
        self.odd_rank, place = own.randrange(world.size), own.randrange(len(self.calls))
        others = [call for call in CALLS if call != self.calls[place]]
        self.mistake, put = own.choice(
            [("leaves out", []), ("repeats", [self.calls[place]] * 2), ("does otherwise", [own.choice(others)])]
        )
        self.place = f"{self.calls[place]} {place}{f' {put[0]}' if len(put) == 1 else ''}"
        if world.rank == self.odd_rank:
            self.calls[place : place + 1] = put

    def __str__(self):
        return f"{self.name} {self.engine} S={self.group_size} rank {self.odd_rank} {self.mistake} {self.place}"

    def make(self, timeout_s):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        topology = Topology(group_size=None if self.is_served else self.group_size, num_servers=int(self.is_served))
        options = RULES[self.name]
        if self.name == "pr_sgd_hetero":
            options = {"local_steps": [3] * world.size}
        rule = algorithms.build("sync_sgd" if self.name == "gradients" else self.name, options)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        averager = Averager(
            model, optimizer, rule, topology, engine=self.engine, total_steps=NUM_STEPS, hang_timeout=timeout_s
        )
        torch.manual_seed(10 + world.rank)
        return averager

    def run(self, averager):
        model, optimizer = averager.model, averager.optimizer
        for call in self.calls:
            if averager.topology.is_server and call != "finish":
                continue
            if call == "step":
                optimizer.zero_grad()
                loss = model(torch.randn(6, 3)).square().mean()
                loss.backward()
                averager.step(loss)
            elif call == "mean_model":
                if averager.agreed_step is not None:
                    with averager.mean_model() as mean:
                        mean(torch.randn(6, 3))
            elif call == "recompute_buffers":
                averager.recompute_buffers([torch.randn(6, 3)])
            else:
                getattr(averager, call)()


def end_of(program, timeout_s):
    """Return how `program` ended, and the text of the errors, on all ranks."""
    averager, error = program.make(timeout_s), None
    try:
        program.run(averager)
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    told = world.allgather((error, averager.topology.is_server, [p.tolist() for p in averager.model.parameters()]))
    errors = [each[0] for each in told]
    if any(errors):
        everywhere = all(each is not None or is_server for each, is_server, _ in told)
        end = "error" if everywhere else "alone"
    else:
        end = "alike" if all(values == told[0][2] for _, _, values in told) else "DIFFERENT"
    return averager, end, next(filter(None, errors), "")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--timeout", type=float, default=2.0)
    options = parser.parse_args()
    for seed in count(options.seed):
        if seed == options.seed + options.count:
            break
        program = Program(seed)
        if world.rank == 0:
            print(f"{seed} begins {program}", flush=True)
        averager, end, error = end_of(program, options.timeout)
        if world.rank == 0:
            print(f"{seed} ends {end} {program}: {error}", flush=True)
        if end in ("error", "alone") and (program.is_served or program.name == "dasgd"):
            break  # with messages and means under way that nobody waits for any more
        averager.topology.free()
    world.Abort(0)


main()
