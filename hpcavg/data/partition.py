"""Partitions: the sample indices of a learner's mini-batches, epoch by epoch, as pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Partition = Callable[[int, int, int, int, int, int], Indices]


def shard_size(num_samples: int, num_learners: int) -> int:
    """Return the samples a learner sees in an epoch: its share of `num_samples`, rounded up."""
    return -(-num_samples // num_learners)


def num_batches(num_samples: int, num_learners: int, batch_size: int) -> int:
    """Return the mini-batches of an epoch, the same on every learner; the last may be smaller."""
    return -(-shard_size(num_samples, num_learners) // batch_size)


def shard(num_samples: int, num_learners: int, learner: int, batch_size: int, seed: int, epoch: int) -> Indices:
    """Return this learner's sample indices of one epoch, disjoint from the others' and reshuffled every epoch.

    Learners take turns by whole mini-batches along one common permutation, so that P learners with batch B see at every
    step the samples that one learner with batch P·B would see. Where P does not divide the samples, the permutation's
    first few (fewer than P) are seen once more, to give every learner the same number.
    """
    order = np.random.default_rng([seed, epoch]).permutation(num_samples)
    total = shard_size(num_samples, num_learners) * num_learners
    order = np.resize(order, total)
    num_full = total // (num_learners * batch_size) * num_learners * batch_size
    full = order[:num_full].reshape(-1, num_learners, batch_size)[:, learner].ravel()
    rest = order[num_full:].reshape(num_learners, -1)[learner]
    return np.concatenate([full, rest])


def shared(num_samples: int, num_learners: int, learner: int, batch_size: int, seed: int, epoch: int) -> Indices:
    """Return this learner's sample indices of one epoch, drawn from the whole set without regard to the others.

    An epoch is as long as with `shard`, so that all learners together still process `num_samples`.
    """
    order = np.random.default_rng([seed, epoch, learner]).permutation(num_samples)
    return order[: shard_size(num_samples, num_learners)]


PARTITIONS: dict[str, Partition] = {"shard": shard, "shared": shared}


def batches(indices: Indices, batch_size: int) -> Iterator[Indices]:
    """Yield `indices` in runs of `batch_size`; the last may be shorter."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]
