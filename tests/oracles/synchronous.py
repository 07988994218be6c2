"""The synchronous algorithms, all learners in one process, one array of shape (learners, numel)."""

import numpy as np


class LocalSgd:
    """SGD with momentum, Nesterov's variant and weight decay, for all learners at once."""

    def __init__(self, rate, momentum=0.0, nesterov=False, weight_decay=0.0):
        self.rate, self.momentum, self.nesterov, self.weight_decay = rate, momentum, nesterov, weight_decay
        self.velocity = None

    def step(self, x, gradient):
        gradient = gradient + self.weight_decay * x
        if self.momentum:
            if self.velocity is None:
                self.velocity = gradient
            else:
                self.velocity = self.momentum * self.velocity + gradient
            gradient = gradient + self.momentum * self.velocity if self.nesterov else self.velocity
        return x - self.rate * gradient


class LocalAdam:
    """Adam, Kingma and Ba 2015, Algorithm 1."""

    def __init__(self, rate, beta1=0.9, beta2=0.999, epsilon=1e-8):
        self.rate, self.beta1, self.beta2, self.epsilon = rate, beta1, beta2, epsilon
        self.m = self.v = 0.0
        self.t = 0

    def step(self, x, gradient):
        self.t += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * gradient
        self.v = self.beta2 * self.v + (1 - self.beta2) * gradient**2
        m_hat = self.m / (1 - self.beta1**self.t)
        v_hat = self.v / (1 - self.beta2**self.t)
        return x - self.rate * m_hat / (np.sqrt(v_hat) + self.epsilon)


def global_mean(u):
    return np.broadcast_to(u.mean(axis=0), u.shape).copy()


def group_means(u, group_size):
    """Hier-AVG: each group of `group_size` consecutive learners takes its own mean; the last may be smaller."""
    x = u.copy()
    for first in range(0, len(u), group_size):
        x[first : first + group_size] = u[first : first + group_size].mean(axis=0)
    return x


def after_step(name, options, t, u, group_size):
    """Return the parameters after step `t` of algorithm `name`, from the local steps' results `u`."""
    if name in ("sgd", "one_shot"):
        return u
    if name == "sync_sgd":
        return global_mean(u)
    if name == "k_avg":
        return global_mean(u) if t % options["k"] == 0 else u
    if name == "hier_avg":
        phase = t % options["k2"]
        if phase == 0:
            return global_mean(u)
        return group_means(u, group_size) if phase % options["k1"] == 0 else u
    if name == "post_local_sgd":
        if t <= options["switch_step"]:
            return global_mean(u)
        return global_mean(u) if t % options["k"] == 0 else u
    raise KeyError(name)


def run(name, options, optimizer, x0, gradient, num_steps, num_learners, group_size):
    """Return the trajectory, shape (steps, learners, numel), and the final mean.

    gradient(x, t) returns the gradients of all learners at `x`, shape (learners, numel).
    """
    x = np.tile(np.asarray(x0, dtype=np.float64), (num_learners, 1))
    trajectory = []
    for t in range(1, num_steps + 1):
        g = gradient(x, t)
        if name == "sync_sgd" and options.get("variant") == "gradients":
            x = optimizer.step(x, global_mean(g))
        elif name == "pr_sgd":  # eq. (2): the gradient is the one at the learner's own x^{t-1}
            x = optimizer.step(global_mean(x) if t % options["interval"] == 0 else x, g)
        else:
            x = after_step(name, options, t, optimizer.step(x, g), group_size)
        trajectory.append(x.copy())
    return np.array(trajectory), x.mean(axis=0)
