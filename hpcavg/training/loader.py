"""The mini-batches of a rank's learners, epoch after epoch, from data that each node holds once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
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


Position = tuple[int, int]
"""An epoch, from 0, and the number of a mini-batch in it, from 0."""


class BatchLoader:
    """The mini-batches of one rank's learners. Constructing it is collective over all ranks.

    Every learner has the samples and augmentations that it would have in a rank of its own. If the rank has several,
    inputs and targets have one more axis, the first, for the learners.

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
    positions : list of Position
        The next mini-batch of each of the rank's learners; they differ only if learners go at their own pace.

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
        has_own_steps = config.rule().own_pace or config.averaging.step_times != "constant"
        has_paces = has_own_steps and topology.learners_per_rank > 1
        if has_paces and share % config.run.batch_size and not config.run.drop_last:
            raise InputError("drop_last", False, "true where learners of a rank go at their own pace")
        self.shortest = min(config.run.batch_size, share - (self.steps_per_epoch - 1) * config.run.batch_size)
        self.positions: list[Position] = [(0, 0)] * topology.learners_per_rank
        self._active: Sequence[int] = range(topology.learners_per_rank)
        self._orders: list[dict[int, Indices]] = [{} for _ in self.positions]  # of every row, by epoch
        self._parts: list[Indices] | None = None  # every learner's samples, if partitioned by labels
        self._check_labels()
        num_threads = config.run.loader_threads
        if num_threads is None:
            num_threads = _LOADER_THREADS if device.type == "cuda" else 0
        self._prefetch = Prefetch(self._make, self._following, num_threads)
        topology.on_shrink(self._deal_again)

    def go_to(self, positions: Sequence[Position]) -> None:
        """Make these mini-batches the next ones, one for each of the rank's learners."""
        self.positions = list(positions)

    def next(self, active: Sequence[int] | None = None) -> tuple[list[int], Tensor, Tensor]:
        """Return the epochs, one for each of the rank's learners, inputs and targets of the next mini-batches.

        Parameters
        ----------
        active : sequence of int
            The rows of the learners that advance. The others wait, and get the same mini-batch again next time.
            None: all.
        """
        self._active = range(len(self.positions)) if active is None else active
        positions = tuple(self.positions)
        self.positions = list(self._following(positions))
        return [epoch for epoch, _ in positions], *self._prefetch.get(positions)

    def peek(self) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the next mini-batches, without advancing."""
        return self._make(tuple(self.positions))

    def first(self, size: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the first `size` samples of the epoch as a mini-batch of the first learner."""
        epoch, _ = self.positions[0]
        index = self._order(0, epoch)[:size]
        inputs = self._inputs(self.data.train_inputs[index], self._generator(0, epoch, 0))
        return inputs, self._targets(self.data.train_targets[index])

    def train_inputs(self, epoch: int) -> Iterator[Tensor]:
        """Yield the inputs of one epoch, to re-estimate BatchNorm statistics. The position stays."""
        for batch in range(self.steps_per_epoch):  # after a loss of learners there may be more samples
            yield self._inputs_at([(epoch, batch)] * len(self.positions))

    def test_batches(self, first: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets of the test samples of all of this rank's learners, without an axis for learners.

        Parameters
        ----------
        first : int
            The mini-batch to begin with; -1: the last, which is the shortest.
        """
        samples = np.concatenate([self._test_samples(row) for row in range(len(self.positions))])
        for index in list(batches(samples, self._config.run.test_batch_size))[first:]:
            yield self._test_batch(index)

    def test_batches_of_learners(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield rows of learners, and inputs and targets of their own test samples, with an axis for these learners."""
        size = self._config.run.test_batch_size
        parts = [list(batches(self._test_samples(row), size)) for row in range(len(self.positions))]
        for number in range(max(map(len, parts))):
            # The first learners have one more sample than the others, or as many.
            there = [(row, part[number]) for row, part in enumerate(parts) if number < len(part)]
            for _, group in groupby(there, lambda each: len(each[1])):
                alike, indices = zip(*group, strict=True)
                inputs, targets = self._test_batch(np.concatenate(indices))
                axis = len(alike), -1
                yield slice(alike[0], alike[-1] + 1), inputs.unflatten(0, axis), targets.unflatten(0, axis)

    def _test_samples(self, row: int) -> Indices:
        """Return a learner's part of the test samples."""
        return np.arange(len(self.data.test_inputs))[self._topology.learners[row] :: self._topology.num_learners]

    def _test_batch(self, index: Indices) -> tuple[Tensor, Tensor]:
        return self._inputs(self.data.test_inputs[index], None), self._targets(self.data.test_targets[index])

    def about(self) -> dict[str, Indices]:
        """Return the attribute ``label_counts``: how many samples of every class a learner sees in the next epoch.

        It has one more axis, the first, if the rank has several learners. Empty if targets are no classes, if there are
        too many classes, or if the rank has no learner.
        """
        labels = self.data.train_targets
        if self._topology.is_server or labels.ndim != 1 or labels.dtype.kind not in "iu":
            return {}
        if labels.min() < 0 or labels.max() >= _MAX_COUNTED_CLASSES:
            return {}
        seen = [labels[self._order(row, epoch)] for row, (epoch, _) in enumerate(self.positions)]
        counts = [np.bincount(own, minlength=int(labels.max()) + 1) for own in seen]
        return {"label_counts": np.stack(counts) if len(counts) > 1 else counts[0]}

    def _following(self, positions: tuple[Position, ...]) -> tuple[Position, ...]:
        """Return the positions after these: learners that wait stay."""
        return tuple(
            self._after(position) if row in self._active else position for row, position in enumerate(positions)
        )

    def _after(self, position: Position) -> Position:
        epoch, batch = position
        return (epoch, batch + 1) if batch + 1 < self.steps_per_epoch else (epoch + 1, 0)

    def _make(self, positions: tuple[Position, ...]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of the mini-batches at `positions`. Any thread may call it."""
        targets = self._targets(self.data.train_targets[_joined(self._samples_at(positions))])
        return self._inputs_at(positions), self._by_learner(targets)

    def _inputs_at(self, positions: Sequence[Position]) -> Tensor:
        """Return the inputs of the mini-batches at `positions`, each with the augmentations of its learner."""
        indices = self._samples_at(positions)
        if self._transform is None:
            return self._by_learner(self._inputs(self.data.train_inputs[_joined(indices)], None))
        inputs = [
            self._inputs(self.data.train_inputs[index], self._generator(row, *position))
            for row, (index, position) in enumerate(zip(indices, positions, strict=True))
        ]
        return torch.stack(inputs) if len(inputs) > 1 else inputs[0]

    def _samples_at(self, positions: Sequence[Position]) -> list[Indices]:
        """Return the samples of each learner's mini-batch."""
        size = self._config.run.batch_size
        return [
            self._order(row, epoch)[batch * size : (batch + 1) * size] for row, (epoch, batch) in enumerate(positions)
        ]

    def _by_learner(self, samples: Tensor) -> Tensor:
        """Return samples that lie learner after learner with an axis for the learners if there are several."""
        num_learners = len(self.positions)
        return samples if num_learners == 1 else samples.unflatten(0, (num_learners, -1))

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

    def _generator(self, row: int, epoch: int, batch: int) -> Generator | None:
        """Return the generator of augmentations of one mini-batch of a learner."""
        if self._transform is None:
            return None
        origin = np.random.SeedSequence([self._config.run.seed, self._topology.learners[row], epoch, batch])
        return Generator().manual_seed(int(origin.generate_state(1, np.uint64)[0]))

    def _order(self, row: int, epoch: int) -> Indices:
        """Return the samples that a learner sees in `epoch`, in order. Two epochs are cached."""
        of_row = self._orders[row]
        order = of_row.get(epoch)
        if order is None:
            order = self._deal(self._topology.learners[row], epoch)
            if self._config.run.drop_last:
                order = order[: len(order) // self._config.run.batch_size * self._config.run.batch_size]
            kept = {e: o for e, o in of_row.items() if e >= epoch - 1}
            self._orders[row] = {**kept, epoch: order}  # a new dictionary: threads read the former one
        return order

    def _deal(self, learner: int, epoch: int) -> Indices:
        run, problem, learners = self._config.run, self._config.problem, self._topology.num_learners
        num_samples, seed = len(self.data.train_inputs), run.seed
        if problem.partition in PARTITIONS:
            return PARTITIONS[problem.partition](num_samples, learners, learner, run.batch_size, seed, epoch)
        if self._parts is None:
            labels = self.data.train_targets
            is_dirichlet = problem.partition == "dirichlet"
            alpha = problem.dirichlet_alpha
            self._parts = dirichlet(labels, learners, alpha, seed) if is_dirichlet else by_class(labels, learners, seed)
        return epoch_of_part(self._parts[learner], shard_size(num_samples, learners), learner, seed, epoch)

    def _check_labels(self) -> None:
        targets, partition = self.data.train_targets, self._config.problem.partition
        if partition not in PARTITIONS and (targets.ndim != 1 or targets.dtype.kind not in "iu"):
            raise InputError(
                "partition", partition, f"{' or '.join(PARTITIONS)} for a task whose targets are no classes"
            )

    def _deal_again(self) -> None:
        """Divide the samples anew: there are fewer learners."""
        self._prefetch.forget()
        self._orders, self._parts = [{} for _ in self.positions], None


def _load_data(task: Task, topology: Topology) -> Data:
    """Return the task's data in memory that the node's ranks share. One rank of each node loads them."""
    own = topology.run_on_all_ranks(lambda: tasks.load_data(task) if topology.node_rank == 0 else None)

    def shared(field: int) -> Any:
        given: Any = None if own is None else own[field]
        in_files = topology.node.bcast(given if isinstance(given, Samples) else None, root=0)
        return in_files if isinstance(in_files, Samples) else share_array(topology.node, given)

    return Data(*(shared(field) for field in range(len(Data._fields))))


def _joined(indices: Sequence[Indices]) -> Indices:
    """Return the samples of all learners, one after the other."""
    return indices[0] if len(indices) == 1 else np.concatenate(indices)
