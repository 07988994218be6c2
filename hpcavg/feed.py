"""The feed: a learner's mini-batches, epoch after epoch, from data that its node holds once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hpcavg import tasks
from hpcavg.config import Config
from hpcavg.data.partition import PARTITIONS, Indices, batches, num_batches, shard_size
from hpcavg.errors import InputError
from hpcavg.node_memory import share_array
from hpcavg.tasks import Data, Task
from hpcavg.topology import Topology


class Feed:
    """The mini-batches of one learner. Collective over everyone to make.

    Where learners are lost, those that are left divide the samples anew, and an epoch keeps its number of steps.

    Attributes
    ----------
    data : all samples. steps_per_epoch : mini-batches of an epoch, the same for every learner.
    epoch, batch : the mini-batch that comes next, both from 0.

    Raises `InputError` on every rank where the data cannot be read or are too few for the batch size.
    """

    def __init__(self, task: Task, config: Config, topology: Topology, device: torch.device) -> None:
        self._config = config
        self._topology = topology
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self.data = _load_data(task, topology)
        samples, learners = len(self.data.train_inputs), topology.num_learners
        share = shard_size(samples, learners)
        if config.batch_size > share:
            allowed = f"at most {share}, a learner's share of {samples} samples over {learners} learners"
            raise InputError("batch_size", config.batch_size, allowed)
        self.steps_per_epoch = num_batches(samples, learners, config.batch_size)
        self.epoch = self.batch = 0
        self._order: Indices | None = None
        topology.on_renewal(self._deal_again)

    def go_to(self, epoch: int, batch: int) -> None:
        """Let the mini-batch `batch` of `epoch` be the next."""
        self.epoch, self.batch = epoch, batch
        self._deal_again()

    def next(self) -> tuple[int, Tensor, Tensor]:
        """Return the epoch, inputs and targets of the next mini-batch."""
        if self._order is None:
            self._order = self._epoch_indices(self.epoch)
        first = self.batch * self._config.batch_size
        index = self._order[first : first + self._config.batch_size]
        epoch = self.epoch
        self.batch += 1
        if self.batch == self.steps_per_epoch:
            self.go_to(epoch + 1, 0)
        return epoch, self.to_device(self.data.train_inputs[index]), self.to_device(self.data.train_targets[index])

    def train_inputs(self, epoch: int) -> Iterator[Tensor]:
        """Yield the inputs of one epoch without training on them, to re-estimate BatchNorm statistics."""
        for index in batches(self._epoch_indices(epoch), self._config.batch_size):
            yield self.to_device(self.data.train_inputs[index])

    def to_device(self, array: Any) -> Tensor:
        """Return samples as a tensor on the learner's device, floating-point ones in the run's dtype."""
        tensor = torch.from_numpy(array)
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype)

    def _epoch_indices(self, epoch: int) -> Indices:
        """Return the samples this learner sees in `epoch`, in order."""
        config, topology = self._config, self._topology
        return PARTITIONS[config.partition](
            len(self.data.train_inputs), topology.num_learners, topology.rank, config.batch_size, config.seed, epoch
        )

    def _deal_again(self) -> None:
        self._order = None


def _load_data(task: Task, topology: Topology) -> Data:
    """Return the task's data in memory that the node's ranks share; one rank of each node loads it."""
    own = topology.do_together(lambda: tasks.load_data(task) if topology.node_rank == 0 else None)
    return Data(
        *(share_array(topology.node, None if own is None else own[field]) for field in range(len(Data._fields)))
    )
