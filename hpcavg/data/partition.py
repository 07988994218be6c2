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


def num_batches(num_samples: int, num_learners: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the mini-batches of an epoch, the same on every learner; the last may be smaller, unless it is dropped."""
    share = shard_size(num_samples, num_learners)
    return share // batch_size if drop_last else -(-share // batch_size)


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
"""Partitions that take no notice of labels."""


def dirichlet(labels: Indices, num_learners: int, alpha: float, seed: int) -> list[Indices]:
    """Return the samples of every learner, the same for the whole run: disjoint parts with skewed labels.

    Every learner wants classes in proportions of its own (Hsu, Qi and Brown, 2019, arXiv:1909.06335), and gets them as
    far as there are samples left. They are drawn from a Dirichlet distribution whose parameter is `alpha` for every
    class where classes are of the same size, and else in proportion to the size. Parts are of the same size, or one
    smaller.
    """
    generator = np.random.default_rng([seed, num_learners])
    by_class, left = _by_class(labels, generator)
    prior = left / left.sum()
    parts = []
    for size in _sizes(len(labels), num_learners):
        wanted = generator.dirichlet(np.maximum(alpha * len(left) * prior, 1e-300))
        counts = np.zeros_like(left)
        while (missing := size - counts.sum()) > 0:
            chances = np.where(left > counts, wanted, 0.0)
            if not chances.sum() > 0:  # of the classes it wants none are left
                chances = (left - counts).astype(float)
            counts = np.minimum(counts + generator.multinomial(missing, chances / chances.sum()), left)
        parts.append(np.concatenate([by_class[c][left[c] - counts[c] : left[c]] for c in range(len(left))]))
        left = left - counts
    return parts


def by_class(labels: Indices, num_learners: int, seed: int) -> list[Indices]:
    """Return the samples of every learner, the same for the whole run: sorted by class and cut into equal parts."""
    order = np.concatenate(_by_class(labels, np.random.default_rng([seed, num_learners]))[0])
    return np.split(order, np.cumsum(_sizes(len(labels), num_learners))[:-1])


def epoch_of_part(part: Indices, size: int, learner: int, seed: int, epoch: int) -> Indices:
    """Return the order in which a learner sees its `part` in one epoch; `size` samples, the first again if need be."""
    return np.resize(np.random.default_rng([seed, epoch, learner]).permutation(part), size)


def _sizes(num_samples: int, num_learners: int) -> Indices:
    """Return the sizes of equal parts, the first ones larger by one where it cannot be helped."""
    return num_samples // num_learners + (np.arange(num_learners) < num_samples % num_learners)


def _by_class(labels: Indices, generator: np.random.Generator) -> tuple[list[Indices], Indices]:
    """Return the samples of every class, shuffled, and how many they are."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(order, np.cumsum(counts)[:-1]), counts


def batches(indices: Indices, batch_size: int) -> Iterator[Indices]:
    """Yield `indices` in runs of `batch_size`; the last may be shorter."""
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]
