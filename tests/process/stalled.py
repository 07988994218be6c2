"""Downpour with messages that the other side has to take: 2 learners and a server, one of which stops in an exchange.

fetch, push: learner 1 has asked for the centre, or begun to send an update. answer: the server is to send the centre.
"""

import os
import signal
import sys

import torch
from mpi4py import MPI

from hpcavg import Averager, Topology, algorithms
from hpcavg.averaging import parameter_server
from hpcavg.averaging.server import FETCH, Server

how, step = sys.argv[1], 0


def stop(rank):
    if MPI.COMM_WORLD.rank == rank and step >= 3:
        os.kill(os.getpid(), signal.SIGSTOP)


def stopping_after(method, rank):
    def call(*arguments):
        result = method(*arguments)
        stop(rank)
        return result

    return call


def take(server, learner, tag):
    global step
    step += 1
    if tag == FETCH:
        stop(2)
    return take_it(server, learner, tag)


if how == "fetch":
    parameter_server._Link.request = stopping_after(parameter_server._Link.request, 1)
elif how == "push":
    parameter_server._Link.push = stopping_after(parameter_server._Link.push, 1)
else:
    take_it, Server._take = Server._take, take
topology = Topology(num_servers=1)
model = torch.nn.Linear(1000, 1000)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
averager = Averager(model, optimizer, algorithms.downpour(2, 2), topology, hang_timeout=2.0)
if not topology.is_server:
    for step in range(1, 10):  # noqa: B007  looked at when it stops
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        averager.step()
averager.finish()
