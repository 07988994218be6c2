"""Means that a thread of the engine takes on 2 ranks: all are awaited, none is, or rank 1's thread fails.

python blocking_means.py wait|leave|fail
"""

import sys

import torch

from hpcavg import Topology
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.engines.gpu.cuda_aware import CudaAwareEngine

topology = Topology()
engine = CudaAwareEngine(topology)
array = torch.full((1, 1000), float(topology.rank))
if topology.rank == 1 and sys.argv[1] == "fail":
    engine._average = None
pending = [engine.start([array], GLOBAL) for _ in range(5)]
if sys.argv[1] == "wait":
    assert all((mean.wait()[0] == 0.5).all() for mean in pending)
if sys.argv[1] == "fail":
    pending[-1].wait()
