"""A program in which a thread fails on the last rank, or something at a prompt; its argument says which."""

import code
import sys
import threading

import torch

from hpcavg import Averager, Topology, algorithms
from hpcavg.engines import pending


def fail():
    raise OSError("cannot write events.log")


def begin(action):
    thread = threading.Thread(target=action, name="a writer")
    thread.start()
    thread.join()


def train(case):
    topology = Topology()
    is_last = topology.rank == topology.num_learners - 1
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    averager = Averager(model, optimizer, algorithms.dasgd(4, 2), topology)
    if is_last and case == "other":
        begin(fail)
    if is_last and case == "prompt":
        sys.ps1 = ">>> "
        code.InteractiveInterpreter().runsource("mdoel")
    if is_last and case == "own":
        pending._ProgressThread._complete = lambda *_: fail()
    for step in range(20):
        if is_last and step == 9 and case in ("training", "main"):
            fail()
        model(torch.randn(8, 4)).square().mean().backward()
        averager.step()
    averager.finish()
    print("rank", topology.rank, "finished", flush=True)
    topology.free()


if __name__ == "__main__":
    if sys.argv[1] == "training":
        begin(lambda: train("training"))
    else:
        train(sys.argv[1])
