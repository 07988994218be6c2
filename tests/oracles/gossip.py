"""Decentralized SGD with whole mixing matrices, all learners in one process."""

import numpy as np


def ring(num_learners):
    """D-PSGD: every learner weighs itself, its left and its right neighbour alike; two learners take their mean."""
    w = np.eye(num_learners)
    if num_learners == 2:
        return [np.full((2, 2), 0.5)]
    return [(w + np.roll(w, 1, axis=1) + np.roll(w, -1, axis=1)) / 3]


def exponential(num_learners):
    """SGP's one-peer graphs, used in turn: learner i gets from i - 2^m."""
    w = np.eye(num_learners)
    num_graphs = max(1, int(np.ceil(np.log2(num_learners))))
    return [(w + np.roll(w, -(2**m), axis=1)) / 2 for m in range(num_graphs)]


def run(matrices, k, optimizer, x0, gradient, num_steps):
    """Return the trajectory, shape (steps, learners, numel), and the final mean; see `synchronous.run`.

    matrices : the W of the means in turn, of shape (learners, learners).
    """
    num_learners = len(matrices[0])
    x = np.tile(np.asarray(x0, dtype=np.float64), (num_learners, 1))
    trajectory = []
    for t in range(1, num_steps + 1):
        x = optimizer.step(x, gradient(x, t))
        if t % k == 0:
            x = matrices[(t // k - 1) % len(matrices)] @ x
        trajectory.append(x.copy())
    return np.array(trajectory), x.mean(axis=0)
