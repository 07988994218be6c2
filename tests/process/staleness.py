"""Downpour on real ranks whose steps take a fixed time. The server prints the staleness of every update.

The learners' steps end one after the other, so that their exchanges seldom meet: a push and the fetch after it are two
messages, between which the server may apply an update of another learner, which is then not stale.
"""

import json
import time

import torch
from mpi4py import MPI

from hpcavg import Averager, Topology, algorithms

STEP_S, STEPS = 0.03, 60

topology = Topology(MPI.COMM_WORLD, num_servers=1)
model = torch.nn.Linear(3, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
averager = Averager(model, optimizer, algorithms.downpour(1, 1), topology, total_steps=STEPS)
MPI.COMM_WORLD.Barrier()
started = time.monotonic() + STEP_S * topology.rank / topology.num_learners
while not averager.done:
    time.sleep(max(0.0, started + STEP_S * (averager.progress.step + 1) - time.monotonic()))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    averager.step()
found = [arrival.staleness for arrival in averager.serve()]
averager.finish()
if topology.is_server:
    print(json.dumps(found), flush=True)
topology.free()
