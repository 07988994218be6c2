"""A learner's mini-batches, epoch after epoch, from data that each node holds once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from hpcavg import tasks
from hpcavg.config.options import Config
from hpcavg.data.partition import (
    PARTITIONS,
    Indices,
    batches,
    by_class,
    dirichlet,
    epoch_of_part,
    num_batches,
    shard_size,
)
from hpcavg.distributed.shared_memory import share_array
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError
from hpcavg.tasks import Data, Samples, Task
from hpcavg.training.prefetch import Prefetch

_LOADER_THREADS = 4
_MAX_COUNTED_CLASSES = 4096  # HDF5 keeps attributes of up to 64 KiB


class BatchLoader:
    """The mini-batches of one learner. Constructing it is collective over all ranks.

    If learners are lost, the others divide the samples anew. An epoch keeps its number of steps.

    Parameters
    ----------
    task : Task
        Loads and transforms the data.
    config : Config
        Its ``batch_size``, ``drop_last``, ``partition``, ``seed`` and so on.
    topology : Topology
        The learners.
    device : torch.device
        Where mini-batches go.

    Attributes
    ----------
    data : Data
        All samples.
    share : int
        A learner's samples in an epoch.
    steps_per_epoch : int
        Mini-batches of an epoch, the same for every learner.
    shortest : int
        Samples of the shortest mini-batch.
    epoch : int
        Epoch of the next mini-batch, from 0.
    batch : int
        Number of the next mini-batch in its epoch, from 0.

    Raises
    ------
    InputError
        On every rank, if the data cannot be read or are too few for the batch size.
    """

    def __init__(self, task: Task, config: Config, topology: Topology, device: torch.device) -> None:
        self._config = config
        self._topology = topology
        self._device = device
        self._dtype: torch.dtype = getattr(torch, config.run.dtype)
        self._transform = task.transform
        self.data = _load_data(task, topology)
        samples, learners = len(self.data.train_inputs), topology.num_learners
        self.share = share = shard_size(samples, learners)
        if config.run.batch_size > share:
            allowed = f"at most {share}, a learner's share of {samples} samples over {learners} learners"
            raise InputError("batch_size", config.run.batch_size, allowed)
        self.steps_per_epoch = num_batches(samples, learners, config.run.batch_size, config.run.drop_last)
        self.shortest = min(config.run.batch_size, share - (self.steps_per_epoch - 1) * config.run.batch_size)
        self.epoch = self.batch = 0
        self._orders: dict[int, Indices] = {}  # by epoch
        self._part: Indices | None = None  # this learner's samples, if partitioned by labels
        self._check_labels()
        num_threads = config.run.loader_threads
        if num_threads is None:
            num_threads = _LOADER_THREADS if device.type == "cuda" else 0
        self._prefetch = Prefetch(self._make, self._following, num_threads)
        topology.on_shrink(self._deal_again)

    def go_to(self, epoch: int, batch: int) -> None:
        """Make the mini-batch `batch` of `epoch` the next one."""
        self.epoch, self.batch = epoch, batch

    def next(self) -> tuple[int, Tensor, Tensor]:
        """Return the epoch, inputs and targets of the next mini-batch."""
        position = self.epoch, self.batch
        self.epoch, self.batch = self._following(position)
        return position[0], *self._prefetch.get(position)

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the next mini-batch, without advancing."""
        return self._make((self.epoch, self.batch))

    def first(self, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the first `size` samples of the epoch as a mini-batch."""
        return self._batch(self._order(self.epoch)[:size], self.epoch, 0)

    def train_inputs(self, epoch: int) -> Iterator[Tensor]:
        """Yield the inputs of one epoch, to re-estimate BatchNorm statistics. The position stays."""
        all_batches = batches(self._order(epoch), self._config.run.batch_size)
        for batch, index in enumerate(
            islice(all_batches, self.steps_per_epoch)
        ):  # after a loss of learners there may be more
            yield self._inputs(self.data.train_inputs[index], self._generator(epoch, batch))

    def test_batches(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of this learner's part of the test samples.

        Parameters
        ----------
        first : int
            The mini-batch to begin with; -1: the last, which is the shortest.
        """
        samples = np.arange(len(self.data.test_inputs))[self._topology.rank :: self._topology.num_learner_ranks]
        for index in list(batches(samples, self._config.run.test_batch_size))[first:]:
            yield self._inputs(self.data.test_inputs[index], None), self._targets(self.data.test_targets[index])

    def about(self) -> dict[str, Indices]:
        """Return the attribute ``label_counts``: how many samples of every class this learner sees in the next epoch.

        Empty if targets are no classes, if there are too many classes, or if the rank is no learner.
        """
        labels = self.data.train_targets
        if self._topology.is_server or labels.ndim != 1 or labels.dtype.kind not in "iu":
            return {}
        if labels.min() < 0 or labels.max() >= _MAX_COUNTED_CLASSES:
            return {}
        return {"label_counts": np.bincount(labels[self._order(self.epoch)], minlength=int(labels.max()) + 1)}

    def _following(self, position: tuple[int, int]) -> tuple[int, int]:
        epoch, batch = position
        return (epoch, batch + 1) if batch + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _make(self, position: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the mini-batch at `position`: its epoch and number. Any thread may call it."""
        epoch, batch = position
        size = self._config.run.batch_size
        return self._batch(self._order(epoch)[batch * size : (batch + 1) * size], epoch, batch)

    def _batch(self, index: Indices, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        inputs = self._inputs(self.data.train_inputs[index], self._generator(epoch, batch))
        return inputs, self._targets(self.data.train_targets[index])

    def _inputs(self, samples: Any, generator: Generator | None) -> Tensor:
        """Return the inputs of samples, transformed and on the device."""
        inputs = torch.from_numpy(samples).to(self._device) if isinstance(samples, np.ndarray) else samples
        if self._transform is not None:
            inputs = self._transform(inputs, generator)
        return self._to_device(inputs)

    def _targets(self, targets: Any) -> Tensor:
        """Return targets on the device; class numbers as int64, which torch's losses take."""
        return self._to_device(targets.astype(np.int64, copy=False) if targets.dtype.kind in "iu" else targets)

    def _to_device(self, samples: Any) -> Tensor:
        """Return samples as a tensor on the learner's device, floating-point ones in the run's dtype."""
        tensor = torch.from_numpy(samples) if isinstance(samples, np.ndarray) else samples
        dtype = self._dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self._device, dtype)

    def _generator(self, epoch: int, batch: int) -> Generator | None:
        """Return the generator of augmentations of one mini-batch of this learner."""
        if self._transform is None:
            return None
        origin = np.random.SeedSequence([self._config.run.seed, self._topology.learners.start, epoch, batch])
        return Generator().manual_seed(int(origin.generate_state(1, np.uint64)[0]))

    def _order(self, epoch: int) -> Indices:
        """Return the samples that this learner sees in `epoch`, in order. Two epochs are cached."""
        order = self._orders.get(epoch)
        if order is None:
            order = self._deal(epoch)
            if self._config.run.drop_last:
                order = order[: len(order) // self._config.run.batch_size * self._config.run.batch_size]
            self._orders = {e: o for e, o in [*self._orders.items(), (epoch, order)] if e >= epoch - 1}
        return order

    def _deal(self, epoch: int) -> Indices:
        run, problem = self._config.run, self._config.problem
        learners, learner = self._topology.num_learners, self._topology.learners.start
        num_samples, seed = len(self.data.train_inputs), run.seed
        if problem.partition in PARTITIONS:
            return PARTITIONS[problem.partition](num_samples, learners, learner, run.batch_size, seed, epoch)
        if self._part is None:
            labels = self.data.train_targets
            is_dirichlet = problem.partition == "dirichlet"
            alpha = problem.dirichlet_alpha
            parts = dirichlet(labels, learners, alpha, seed) if is_dirichlet else by_class(labels, learners, seed)
            self._part = parts[learner]
        return epoch_of_part(self._part, shard_size(num_samples, learners), learner, seed, epoch)

    def _check_labels(self) -> None:
        targets, partition = self.data.train_targets, self._config.problem.partition
        if partition not in PARTITIONS and (targets.ndim != 1 or targets.dtype.kind not in "iu"):
            raise InputError(
                "partition", partition, f"{' or '.join(PARTITIONS)} for a task whose targets are no classes"
            )

    def _deal_again(self) -> None:
        """Divide the samples anew: there are fewer learners."""
        self._prefetch.forget()
        self._orders, self._part = {}, None


def _load_data(task: Task, topology: Topology) -> Data:
    """Return the task's data in memory that the node's ranks share. One rank of each node loads them."""
    own = topology.run_on_all_ranks(lambda: tasks.load_data(task) if topology.node_rank == 0 else None)

    def shared(field: int) -> Any:
        given: Any = None if own is None else own[field]
        in_files = topology.node.bcast(given if isinstance(given, Samples) else None, root=0)
        return in_files if isinstance(in_files, Samples) else share_array(topology.node, given)

    return Data(*(shared(field) for field in range(len(Data._fields))))
