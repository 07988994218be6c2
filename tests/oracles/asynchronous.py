"""The asynchronous baselines as sequential programs, for a given order of arrivals.

`arrivals` lists learners: each entry is one turn, a local step and then the exchanges due at the learner's own step
count. gradient(x, t) returns the gradients of all learners at `x`; the learner's own t is passed and its row taken.
"""

import numpy as np


class Learners:
    """The parameters, shape (learners, numel), optimizers and step counts of all learners."""

    def __init__(self, make_optimizer, x0, gradient, num_learners):
        self.x = np.tile(np.asarray(x0, dtype=np.float64), (num_learners, 1))
        self.optimizers = [make_optimizer() for _ in range(num_learners)]
        self.steps = [0] * num_learners
        self.gradient = gradient

    def step(self, j):
        """Take learner j's next local step; return its step count."""
        self.steps[j] += 1
        self.x[j] = self.optimizers[j].step(self.x[j], self.gradient(self.x, self.steps[j])[j])
        return self.steps[j]


def downpour(arrivals, make_optimizer, x0, gradient, n_push, n_fetch, num_learners):
    """Downpour SGD, Dean et al. 2012: return the centre, all learners' x, the staleness of each push.

    Staleness: updates of the centre, by any learner, since the pushing learner's last fetch.
    """
    learners = Learners(make_optimizer, x0, gradient, num_learners)
    centre = learners.x[0].copy()
    accumulated = np.zeros_like(learners.x)
    version, fetched_version, staleness = 0, [0] * num_learners, []
    for j in arrivals:
        before = learners.x[j].copy()
        t = learners.step(j)
        accumulated[j] += learners.x[j] - before
        if t % n_push == 0:
            staleness.append(version - fetched_version[j])
            centre += accumulated[j]
            accumulated[j] = 0.0
            version += 1
        if t % n_fetch == 0:
            learners.x[j] = centre
            fetched_version[j] = version
    return centre, learners.x, staleness


def eamsgd(arrivals, make_optimizer, x0, gradient, tau, alpha, num_learners):
    """EAMSGD, Zhang et al. 2015: return the centre, all learners' x, the staleness of each exchange (always 0).

    The exchange comes after the local step, where the paper has it before (ALGORITHMS.md).
    """
    learners = Learners(make_optimizer, x0, gradient, num_learners)
    centre = learners.x[0].copy()
    staleness = []
    for j in arrivals:
        if learners.step(j) % tau == 0:
            difference = alpha * (learners.x[j] - centre)
            learners.x[j] -= difference
            centre += difference
            staleness.append(0)
    return centre, learners.x, staleness
