"""Runs of several algorithms in which every wait for other ranks is looked at: the watchdog must have been told.

Each rank prints what it waited in untold, from the first averager to the end of the run, and then how often it waited.
"""

import contextlib
import io
import sys
import tempfile
import threading
from collections import Counter

from mpi4py import MPI

from hpcavg import Topology
from hpcavg.cli import parsers
from hpcavg.distributed import waiting
from hpcavg.distributed import watchdog as watchdog_module
from hpcavg.training import trainer

WAITS = (
    "Allgather Allgatherv Allreduce Alltoall Barrier Bcast Dup Gather Recv Reduce Reduce_scatter Scatter Send Split"
    " Split_type allgather allreduce alltoall barrier bcast gather recv reduce scatter send"
)
RUNS = [
    "hier-avg --check-rounds 1 --optimizer-state average",
    "dasgd --engine mpi",
    "pr-sgd-hetero",
    "slowmo",
    "downpour",
]
world = MPI.COMM_WORLD
supervisors, untold, told = [], Counter(), Counter()


def note(name, frame):
    """Note that this rank may wait from now on, where `frame` says."""
    if not supervisors or threading.current_thread() is not threading.main_thread():
        return
    supervisor = supervisors[-1]
    if supervisor.wait is None and not supervisor._is_closed:
        untold[f"{name} in {frame.f_code.co_filename}, line {frame.f_lineno}"] += 1
    told[name] += 1


class Noted(MPI.Intracomm):
    """A communicator that notes its waits; those made of it are of this kind, too."""


def noted(name):
    method = getattr(MPI.Intracomm, name)

    def call(self, *arguments, **options):
        if self.Get_size() > 1:
            note(name, sys._getframe(1))
        return method(self, *arguments, **options)

    return call


for name in WAITS.split():
    setattr(Noted, name, noted(name))
split, wait_until, watch_over = Topology._split, waiting.wait_until, watchdog_module.watch_over
Topology._split = lambda self, everyone: split(self, Noted(everyone))


def wait_until_noted(is_there, interval_s):
    note("wait_until", sys._getframe(2))
    wait_until(is_there, interval_s)


def watch_over_noted(*arguments):
    watch = watch_over(*arguments)
    supervisors.append(watch.supervisor)
    return watch


waiting.wait_until = wait_until_noted
trainer.watch_over = watch_over_noted

for options in RUNS:
    folder = world.bcast(tempfile.mkdtemp() if world.rank == 0 else None)
    is_synchronous = "downpour" not in options
    more = ["--resume", "auto", "--checkpoint-steps", 20] if is_synchronous else []
    for steps in (60, 90) if is_synchronous else (60,):
        given = [
            "--algorithm",
            *options.split(),
            "--model",
            "logistic",
            "--steps",
            steps,
            *more,
            "--output",
            folder + "/run",
        ]
        supervisors.clear()
        with contextlib.redirect_stdout(io.StringIO()):
            assert trainer.Trainer(parsers.parse_train(["--model", "logistic", *map(str, given)])).train() == 0
for where, times in untold.items():
    print(f"untold {times} times: {where}", flush=True)
print(dict(told), flush=True)
