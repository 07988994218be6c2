"""The synchronous algorithms with one learner that falls sick: the mean is over the others, and it starts over there.

Parameters that are not finite are NaN. Whoever gets finite ones at a mean has no momentum and no gradient any more.
"""

import numpy as np

from tests.oracles import synchronous


def healthy_mean(u):
    """Return the mean over the finite rows for every row; `u` itself where there are none."""
    finite = np.isfinite(u).all(axis=1)
    return np.broadcast_to(u[finite].mean(axis=0), u.shape).copy() if finite.any() else u


def healthy_group_means(u, group_size):
    return np.concatenate([healthy_mean(u[first : first + group_size]) for first in range(0, len(u), group_size)])


class DaSgd(synchronous.DaSgd):
    """Sick when the mean starts: the mean takes the learner's place. Sick later: nobody knows until the next."""

    was_sick = None

    def after(self, t, u):
        if t % self.tau == 0:
            self.was_sick = ~np.isfinite(u).all(axis=1, keepdims=True)
        return super().after(t, u)

    def merge(self, u):
        if self.in_flight is None:
            return u
        mean = self.in_flight
        return np.where(self.was_sick | (self.xi == 0), mean, super().merge(u))


def run(name, options, optimizer, problem, num_steps, size, group_size, sick, sick_step, monkeypatch):
    """Return the trajectory, shape (steps, learners, numel), and the final mean; see `synchronous.run`.

    sick, sick_step : the learner that turns NaN by its local step at that time. optimizer : a `synchronous.LocalSgd`.
    """
    monkeypatch.setattr(synchronous, "global_mean", healthy_mean)
    monkeypatch.setattr(synchronous, "group_means", healthy_group_means)
    monkeypatch.setattr(synchronous, "DaSgd", DaSgd)
    x = np.tile(np.asarray(problem.x0, dtype=np.float64), (size, 1))
    rule, rates = synchronous.rule_and_rates(name, options, optimizer, x, num_steps, size, 5)
    trajectory = []
    for t in range(1, num_steps + 1):
        if rates is not None:
            optimizer.rate = rates[t - 1]
        gradient = problem.gradient(x, t)
        before = np.isfinite(x).all(axis=1, keepdims=True)
        if name == "pr_sgd":
            x = healthy_mean(x) if t % options["interval"] == 0 else x
            restored = ~before & np.isfinite(x)
            start_over(optimizer, restored)
            gradient = np.where(restored, 0.0, gradient)
        x = optimizer.step(x, gradient)
        if t == sick_step:
            x[sick] = np.nan
        before = np.isfinite(x)
        if rule is not None:
            x = rule.after(t, x)
        elif name != "pr_sgd":
            x = synchronous.after_step(name, options, t, x, group_size)
        is_known = rule.was_sick if isinstance(rule, DaSgd) and rule.was_sick is not None else True
        start_over(optimizer, ~before & np.isfinite(x) & is_known)
        trajectory.append(x.copy())
    if isinstance(rule, DaSgd):
        x = rule.merge(x)
    return np.array(trajectory), healthy_mean(x)[0]


def start_over(optimizer, restored):
    if optimizer.velocity is not None:
        optimizer.velocity = np.where(restored, 0.0, optimizer.velocity)
