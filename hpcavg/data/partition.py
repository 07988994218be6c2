"""Partitions: which samples a learner sees in an epoch, and in which order. Pure functions of seed and epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Partition = Callable[[int, int, int, int, int, int], Indices]


def shard_size(num_samples: int, num_learners: int) -> int:
    """Return how many samples a learner sees in an epoch: its share of `num_samples`, rounded up."""
    return -(-num_samples // num_learners)


def num_batches(num_samples: int, num_learners: int, batch_size: int, drop_last: bool = False) -> int:
    """Return the number of mini-batches of an epoch, the same on every learner.

    The last may be smaller than `batch_size`; with `drop_last` it is left out then.
    """
    share = shard_size(num_samples, num_learners)
    return share // batch_size if drop_last else -(-share // batch_size)


def shard(num_samples: int, num_learners: int, learner: int, batch_size: int, seed: int, epoch: int) -> Indices:
    """Return the sample indices of a learner in one epoch: disjoint from the other learners', shuffled every epoch.

    All learners follow one permutation and take whole mini-batches from it in turn. At every step P learners with
    batches of B samples see the samples that one learner with batches of P·B samples would see. If P does not divide
    the number of samples, the first few of the permutation, fewer than P, are seen twice.

    Parameters
    ----------
    num_samples : int
        The samples of the data set.
    num_learners : int
        All learners.
    learner : int
        This learner's number, from 0.
    batch_size : int
        The samples of a learner's mini-batch.
    seed : int
        The seed of the run.
    epoch : int
        The epoch, from 0.

    Returns
    -------
    array of int64
        Shape (`shard_size`,).

    Examples
    --------
    >>> from hpcavg.data.partition import shard
    >>> parts = [shard(8, 2, learner, batch_size=2, seed=0, epoch=0) for learner in range(2)]
    >>> sorted(int(index) for part in parts for index in part)
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    total = shard_size(num_samples, num_learners) * num_learners
    order = np.resize(_permutation(num_samples, seed, epoch), total)
    num_full = total // (num_learners * batch_size) * num_learners * batch_size
    full = order[:num_full].reshape(-1, num_learners, batch_size)[:, learner].ravel()
    rest = order[num_full:].reshape(num_learners, -1)[learner]
    return np.concatenate([full, rest])


@lru_cache(maxsize=1)
def _permutation(num_samples: int, seed: int, epoch: int) -> Indices:
    """Return the order of an epoch that all learners follow. The learners of one rank take turns to ask for it."""
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


def shared(num_samples: int, num_learners: int, learner: int, batch_size: int, seed: int, epoch: int) -> Indices:
    """Return the sample indices of a learner in one epoch, drawn from all samples independently of other learners.

    An epoch is as long as with `shard`: all learners together process `num_samples`. The parameters are those of
    `shard`.

    Examples
    --------
    >>> from hpcavg.data.partition import shared
    >>> len(shared(8, num_learners=2, learner=0, batch_size=2, seed=0, epoch=0))
    4
    """
    order = np.random.default_rng([seed, epoch, learner]).permutation(num_samples)
    return order[: shard_size(num_samples, num_learners)]


PARTITIONS: dict[str, Partition] = {"shard": shard, "shared": shared}
"""The partitions that ignore labels, by name."""


def dirichlet(labels: Indices, num_learners: int, alpha: float, seed: int) -> list[Indices]:
    """Return the samples of every learner for the whole run: disjoint parts with skewed labels.

    Every learner draws its own proportions of classes from a Dirichlet distribution (Hsu, Qi and Brown, 2019,
    arXiv:1909.06335), and gets them as long as there are samples left. Sizes of parts differ by at most one.

    Parameters
    ----------
    labels : array of int64
        Shape (n,), the class of every sample.
    num_learners : int
        All learners.
    alpha : float
        The parameter of the distribution for a class of average size; it is in proportion to the class's size. A small
        value gives each learner few classes, a large one the proportions of the data set.
    seed : int
        The seed of the run.

    Returns
    -------
    list of arrays of int64
        The sample indices of each learner.

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.data.partition import dirichlet
    >>> parts = dirichlet(np.arange(100) % 10, num_learners=4, alpha=0.1, seed=0)
    >>> [len(part) for part in parts]
    [25, 25, 25, 25]
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
            if not chances.sum() > 0:  # no samples are left of the classes that the learner draws
                chances = (left - counts).astype(float)
            counts = np.minimum(counts + generator.multinomial(missing, chances / chances.sum()), left)
        parts.append(np.concatenate([by_class[c][left[c] - counts[c] : left[c]] for c in range(len(left))]))
        left = left - counts
    return parts


def by_class(labels: Indices, num_learners: int, seed: int) -> list[Indices]:
    """Return the samples of every learner for the whole run: sorted by class and cut into equal parts.

    The parameters and the result are those of `dirichlet`.

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.data.partition import by_class
    >>> labels = np.array([1, 0, 1, 0])
    >>> [labels[part].tolist() for part in by_class(labels, num_learners=2, seed=0)]
    [[0, 0], [1, 1]]
    """
    order = np.concatenate(_by_class(labels, np.random.default_rng([seed, num_learners]))[0])
    return np.split(order, np.cumsum(_sizes(len(labels), num_learners))[:-1])


def epoch_of_part(part: Indices, size: int, learner: int, seed: int, epoch: int) -> Indices:
    """Return the order in which a learner sees its `part` in one epoch.

    The result has `size` indices; if the part is smaller, its first samples are repeated.
    """
    return np.resize(np.random.default_rng([seed, epoch, learner]).permutation(part), size)


def _sizes(num_samples: int, num_learners: int) -> Indices:
    """Return the sizes of equal parts; the first ones are larger by one if `num_learners` does not divide."""
    return num_samples // num_learners + (np.arange(num_learners) < num_samples % num_learners)


def _by_class(labels: Indices, generator: np.random.Generator) -> tuple[list[Indices], Indices]:
    """Return the shuffled samples of every class, and their numbers."""
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]
    counts = np.unique(labels, return_counts=True)[1]
    return np.split(order, np.cumsum(counts)[:-1]), counts


def batches(indices: Indices, batch_size: int) -> Iterator[Indices]:
    """Yield `indices` in pieces of `batch_size`; the last may be shorter.

    >>> [batch.tolist() for batch in batches(np.arange(5), 2)]
    [[0, 1], [2, 3], [4]]
    """
    for start in range(0, len(indices), batch_size):
        yield indices[start : start + batch_size]
