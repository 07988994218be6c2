"""The averagers of PyTorch and accelerate, over gloo on the ranks of an MPI run."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, distributed
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager

from hpcavg import Topology

PARAMETER_ELEMENTS = 2**18  # of a parameter tensor, for averagers that work tensor by tensor


@contextlib.contextmanager
def gloo(topology: Topology, interface: str | None = None) -> Iterator[None]:
    """Run torch.distributed over gloo on the learners, inside the block. Collective.

    The ranks meet at a port of rank 0's node. Its address is the variable ``MASTER_ADDR``, or the loopback address on a
    single node, or else the node's name.

    Parameters
    ----------
    topology : Topology
        The learners.
    interface : str, optional
        The network interface for gloo. Default: the one of the node's name.
    """
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    here = "127.0.0.1" if topology.num_nodes == 1 else socket.gethostname()
    host = topology.learner_ranks.bcast(os.environ.setdefault("MASTER_ADDR", here))
    os.environ["MASTER_ADDR"] = host  # accelerate reads it
    store = None
    if topology.rank == 0:
        store = distributed.TCPStore(host, 0, topology.num_learners, is_master=True, wait_for_workers=False)
    port = topology.learner_ranks.bcast(store.port if store else None)
    if store is None:
        store = distributed.TCPStore(host, port, topology.num_learners, is_master=False)
    distributed.init_process_group("gloo", store=store, rank=topology.rank, world_size=topology.num_learners)
    try:
        yield
        topology.learner_ranks.Barrier()  # the store is rank 0's
    finally:
        distributed.destroy_process_group()


def means(topology: Topology, values: Tensor) -> dict[str, Callable[[], object]]:
    """Return calls that put the mean over all learners into `values`, shape (numel,), by the name of the peer."""

    def all_reduce() -> None:
        distributed.all_reduce(values)
        values.div_(topology.num_learners)

    parameters = [torch.nn.Parameter(part) for part in values.split(PARAMETER_ELEMENTS)]
    no_gradient = torch.zeros(PARAMETER_ELEMENTS)
    for parameter in parameters:  # torch's averagers skip parameters without a gradient
        parameter.grad = no_gradient[: parameter.numel()]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "When period is 1")
        periodic = PeriodicModelAverager(period=1, warmup_steps=0)
    found: dict[str, Callable[[], object]] = {
        "gloo all_reduce": all_reduce,
        "torch periodic": lambda: periodic.average_parameters(parameters),
    }
    group_size = _group_size(topology)
    if group_size:
        hierarchical = HierarchicalModelAverager(OrderedDict([(1, group_size), (2, topology.num_learners)]))

        def average() -> None:
            hierarchical.step = 0  # at this step the global mean is due
            hierarchical.average_parameters(parameters)

        found["torch hierarchical"] = average
    if topology.num_learners > 1 and importlib.util.find_spec("accelerate"):
        found["accelerate LocalSGD"] = _local_sgd(values)
    return found


def _group_size(topology: Topology) -> int | None:
    """Return the group size of torch's lower level: a node's ranks, or 2; None if there cannot be two levels."""
    sizes = set(topology.group_sizes.values())
    size = sizes.pop() if len(sizes) == 1 and topology.num_groups > 1 else 2
    return size if 1 < size < topology.num_learners and topology.num_learners % size == 0 else None


def _local_sgd(values: Tensor) -> Callable[[], object]:
    from accelerate import Accelerator
    from accelerate.local_sgd import LocalSGD

    # It needs its own parameters: it gives them new memory at every mean.
    model = torch.nn.ParameterList(torch.nn.Parameter(part) for part in values.split(PARAMETER_ELEMENTS))
    return LocalSGD(Accelerator(cpu=True), model, local_sgd_steps=1).step
