"""A program that trains from DataLoaders, whose workers are started in every way while a mean is on its way.

Rank 1's last worker raises where the program is called with the word `raise`.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time

import torch
from torch.utils.data import DataLoader, Dataset

from hpcavg import Averager, Topology, algorithms
from hpcavg.distributed import child_processes
from hpcavg.distributed.preemption import PauseKind, Pauses
from hpcavg.distributed.supervisor import Supervisor

METHODS = ("forkserver", "spawn", "fork")
STEPS = 8


class Samples(Dataset):
    def __init__(self, method, raises):
        self.method, self.raises = method, raises

    def __len__(self):
        return 8 * STEPS

    def __getitem__(self, index):
        if self.raises:
            raise KeyError("a sample is missing")
        if self.method != "fork":
            from mpi4py import MPI

            assert not MPI.Is_initialized()
        try:
            child_processes.require_rank()
        except RuntimeError:
            return torch.full((4,), float(index % 5))
        raise AssertionError("the worker takes itself for a rank")


def break_a_thread(worker):
    thread = threading.Thread(target=lambda: 1 / 0)
    thread.start()
    thread.join()


def main():
    topology = Topology()
    child_processes.require_rank()
    supervisor = Supervisor(topology.learner_ranks)
    pauses = Pauses(supervisor, topology, catch_signals=True)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    averager = Averager(model, optimizer, algorithms.dasgd(4, 2), topology)
    for method in METHODS:
        raises = method == "fork" and topology.rank == 1 and "raise" in sys.argv
        loader = DataLoader(
            Samples(method, raises),
            batch_size=8,
            num_workers=1,
            multiprocessing_context=method,
            worker_init_fn=break_a_thread,
        )
        for x in loader:
            optimizer.zero_grad()
            model(x).square().mean().backward()
            averager.step()
    averager.finish()
    pid = os.fork()
    if pid == 0:
        raise ValueError("a child's own matter")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    asleep = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
    asleep.start()
    asleep.terminate()
    asleep.join()
    assert asleep.exitcode == -signal.SIGTERM
    assert pauses.requested is PauseKind.NOTHING
    supervisor.close()
    print(averager.progress.step, model.weight.sum().item(), flush=True)


if __name__ == "__main__":
    main()
