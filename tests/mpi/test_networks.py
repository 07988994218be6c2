"""Every reference network on real ranks: learners part at a step of their own and are one after a global mean."""

import pytest
import torch
from mpi4py import MPI
from torch.nn.functional import cross_entropy

from hpcavg import Averager, Topology, algorithms, models
from hpcavg.checkpoints import tensor_file

pytestmark = pytest.mark.mpi

SMALL = ["logistic", "mlp", "cnn", "resnet20", "mobilenetv2"]
# All of them where they are cheapest: two ranks already show what a mean does to a network.
NAMES = list(models.NETWORKS) if MPI.COMM_WORLD.Get_size() == 2 else SMALL


@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_hier_avg(name, world):
    """Groups of one, so the local mean of step 1 leaves learners apart; that of step 2 is global."""
    rank = world.Get_rank()
    network = models.NETWORKS[name]
    pixels = network.min_pixels or 8
    shape = (network.input_shape[0], *[pixels for _ in network.input_shape[1:]])
    torch.manual_seed(rank)  # the averager gives all the parameters of rank 0
    model = models.build(name, shape, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    topology = Topology(world, group_size=1)
    averager = Averager(model, optimizer, algorithms.hier_avg(k1=1, k2=2), topology)
    torch.manual_seed(100 + rank)
    num_different = []
    for _ in range(2):
        optimizer.zero_grad()
        loss = cross_entropy(model(torch.randn(2, *shape)), torch.tensor([rank % 10, 9 - rank % 10]))
        loss.backward()
        averager.step()
        assert loss.isfinite()
        num_different.append(len(set(world.allgather(tensor_file.digest(model.state_dict())))))
    assert num_different == [world.Get_size(), 1]
    assert all(value.isfinite().all() for value in model.state_dict().values())
    topology.free()
