"""Post-local SGD as in Lin et al. 2018, Algorithm 1: rounds of H(t) local steps, 1 if t <= t' and H after that."""

import numpy as np


def run(switch_round, num_local_steps, rate, x0, num_workers, gradient, num_steps):
    """Return what every worker holds after each of its steps, shape (steps, workers, numel).

    gradient(x, step) returns the gradients of all workers at `x`, shape (workers, numel); `step` counts from 1. Rounds
    of one step make t' = `switch_round` the step after which workers go alone.
    """
    w = np.asarray(x0, dtype=np.float64)  # w_(t), which all workers have at the start of round t
    held, t = [], 0
    while len(held) < num_steps:
        t += 1
        own = np.repeat([w], num_workers, axis=0)  # w^k_(t)+h
        for _ in range(1 if t <= switch_round else num_local_steps):
            own = own - rate * gradient(own, len(held) + 1)
            held.append(own)
        w = w - (w - own).sum(axis=0) / num_workers
        held[-1] = np.repeat([w], num_workers, axis=0)
    return np.array(held[:num_steps])
