"""The synchronous algorithms, all learners in one process, one array of shape (learners, numel)."""

import math
from fractions import Fraction
from itertools import accumulate, pairwise

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
    """Return the parameters after step `t` of an algorithm without memory, from the local steps' results `u`."""
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
        since = t - options["switch_step"]
        return global_mean(u) if since <= 0 or since % options["k"] == 0 else u
    raise KeyError(name)


class DaSgd:
    """DaSGD, eq. (4) and appendix A.2; the mean in flight is the one of the last snapshot."""

    def __init__(self, tau, delay, xi):
        self.tau, self.delay, self.xi = tau, delay, xi
        self.in_flight = None

    def after(self, t, u):
        if t % self.tau == 0:
            self.in_flight = global_mean(u)
        if t - self.delay >= self.tau and (t - self.delay) % self.tau == 0:
            u = self.merge(u)
        return u

    def merge(self, u):
        mean, self.in_flight = self.in_flight, None
        return u if mean is None else self.xi * u + (1 - self.xi) * mean


class SlowMo:
    """SlowMo, Wang et al. 2020, Algorithm 1."""

    def __init__(self, x0, optimizer, k, beta, outer_lr):
        self.anchor, self.optimizer, self.k, self.beta, self.outer_lr = x0, optimizer, k, beta, outer_lr
        self.u = 0.0

    def after(self, t, x):
        if t % self.k:
            return x
        rate = self.optimizer.rate
        self.u = self.beta * self.u + (self.anchor - global_mean(x)) / rate
        self.anchor = self.anchor - self.outer_lr * rate * self.u
        return self.anchor


class DiLoCo:
    """DiLoCo, Douillard et al. 2023, Algorithm 1, with the Nesterov SGD of torch as the outer optimizer."""

    def __init__(self, x0, h, outer_lr, outer_momentum):
        self.anchor, self.h, self.outer_lr, self.momentum = x0, h, outer_lr, outer_momentum
        self.v = 0.0

    def after(self, t, x):
        if t % self.h:
            return x
        delta = self.anchor - global_mean(x)
        self.v = self.momentum * self.v + delta
        self.anchor = self.anchor - self.outer_lr * (delta + self.momentum * self.v)
        return self.anchor


class Periods:
    """The global mean at the end of every one of the given periods."""

    def __init__(self, periods):
        self.ends = set(accumulate(periods))

    def after(self, t, u):
        return global_mean(u) if t in self.ends else u


class LossPeriods:
    """ADA-LUPA-SGD, eq. (11), F being the mean loss of a period; the last is cut, so that they sum to T."""

    def __init__(self, tau0, num_steps):
        self.tau0, self.num_steps = tau0, num_steps
        self.end = min(tau0, num_steps)
        self.losses, self.first = [], None

    def after(self, t, u):
        if t < self.end:
            return u
        period_loss = float(np.mean(self.losses))
        self.losses = []
        if self.first is None:
            self.first = period_loss
        factor = 1
        if 0 < self.first < math.inf and 0 < period_loss < math.inf:
            factor = max(1, math.ceil((self.first / period_loss) ** (1 / 3)))
        self.end = min(t + factor * self.tau0, self.num_steps)
        return global_mean(u)


def ada_lupa_periods(tau0, alpha, num_steps):
    """LUPA-SGD, section 6: tau_i = ceil((1 + i alpha) tau_0), the last cut at `num_steps`."""
    periods, left = [], num_steps
    while left > 0:
        tau = math.ceil((1 + len(periods) * Fraction(str(alpha))) * tau0)
        periods.append(min(tau, left))
        left -= periods[-1]
    return periods


def ada_lupa_periods_of_rounds(tau0, rounds, num_steps):
    """LUPA-SGD, section 6: alpha such that `rounds` periods of (1 + i alpha) tau_0 fill `num_steps`."""
    if rounds == 1:
        return [num_steps]
    if num_steps <= rounds * tau0:
        return ada_lupa_periods(tau0, 0, num_steps)
    # num_steps = rounds tau_0 + alpha tau_0 rounds (rounds - 1) / 2
    alpha = Fraction(2 * (num_steps - rounds * tau0), tau0 * rounds * (rounds - 1))
    ends = [math.ceil(tau) for tau in accumulate((1 + i * alpha) * tau0 for i in range(rounds))]
    return [end - start for start, end in pairwise([0, *ends])]


def lupa_tau(num_steps, num_learners, batch_size):
    """LUPA-SGD, section 6: tau = T^(2/3) / (p b)^(1/3)."""
    return max(1, round(num_steps ** (2 / 3) / (num_learners * batch_size) ** (1 / 3)))


def lupa_rates(mu, shift, num_steps):
    """LUPA-SGD, Theorem 1: eta_0, eta_1, ..., the rates of steps 1, 2, ..."""
    return [4 / (mu * (t - 1 + shift)) for t in range(1, num_steps + 1)]


def pr_sgd_epochs(num_learners, num_steps):
    """PR-SGD, Theorem 2: K^s = ceil(s^(1/3) / N) for s = 1, 2, ... until `num_steps` are covered."""
    epochs, local_steps, left = [], 1, num_steps
    while left > 0:
        s = len(epochs) + 1
        while (local_steps * num_learners) ** 3 < s:
            local_steps += 1
        epochs.append(local_steps)
        left -= local_steps
    return epochs


def rule_and_rates(name, options, optimizer, x0, num_steps, num_learners, batch_size):
    """Return an algorithm's memory, with `after(t, u)`, and its rates, one a step; each None if it has none."""
    options = dict(options)
    mu, shift = options.pop("mu", None), options.pop("shift", None)
    if name == "pr_sgd_time_varying":
        epochs = pr_sgd_epochs(num_learners, num_steps)
        rates = []
        for s, local_steps in enumerate(epochs, 1):
            rates += [optimizer.rate * num_learners / s ** (2 / 3)] * local_steps
        return Periods(epochs), rates
    if name == "dasgd":
        return DaSgd(**options), None
    if name == "slowmo":
        return SlowMo(x0, optimizer, **options), None
    if name == "diloco":
        return DiLoCo(x0, **options), None
    if name == "lupa":
        tau = lupa_tau(num_steps, num_learners, batch_size) if options["tau"] == "auto" else options["tau"]
        rule, longest = Periods([tau] * (num_steps // tau)), tau
    elif name == "ada_lupa" and options.get("growth") == "loss":
        rule, longest = LossPeriods(options["tau0"], num_steps), None
    elif name == "ada_lupa":
        if "rounds" in options:
            periods = ada_lupa_periods_of_rounds(options["tau0"], options["rounds"], num_steps)
        else:
            periods = ada_lupa_periods(options["tau0"], options["alpha"], num_steps)
        rule, longest = Periods(periods), max(periods)
    else:
        return None, None
    if mu is None:
        return rule, None
    return rule, lupa_rates(mu, longest + 4 if shift is None else shift, num_steps)


def run(name, options, optimizer, x0, gradient, num_steps, num_learners, group_size, loss=None, batch_size=None):
    """Return the trajectory, shape (steps, learners, numel), and the final mean.

    gradient(x, t) returns the gradients of all learners at `x`, shape (learners, numel); loss(x, t) their losses on
    the same mini-batches, shape (learners,).
    """
    x = np.tile(np.asarray(x0, dtype=np.float64), (num_learners, 1))
    rule, rates = rule_and_rates(name, options, optimizer, x, num_steps, num_learners, batch_size)
    trajectory = []
    for t in range(1, num_steps + 1):
        if rates is not None:
            optimizer.rate = rates[t - 1]
        if isinstance(rule, LossPeriods):
            rule.losses.append(loss(x, t))
        g = gradient(x, t)
        if name == "sync_sgd" and options.get("variant") == "gradients":
            x = optimizer.step(x, global_mean(g))
        elif name == "pr_sgd":  # eq. (2): the gradient is the one at the learner's own x^{t-1}
            x = optimizer.step(global_mean(x) if t % options["interval"] == 0 else x, g)
        elif rule is not None:
            x = rule.after(t, optimizer.step(x, g))
        else:
            x = after_step(name, options, t, optimizer.step(x, g), group_size)
        trajectory.append(x.copy())
    if isinstance(rule, DaSgd):
        x = rule.merge(x)
    return np.array(trajectory), x.mean(axis=0)


def run_hetero(local_steps, make_optimizer, x0, gradient, num_rounds):
    """PR-SGD, Algorithm 3: return the mean after each round, shape (rounds, numel).

    Learner j has its own optimizer and takes local_steps[j] steps a round; gradient(x, t) is given its own t.
    """
    num_learners = len(local_steps)
    x = np.tile(np.asarray(x0, dtype=np.float64), (num_learners, 1))
    optimizers = [make_optimizer() for _ in local_steps]
    t = [0] * num_learners
    means = []
    for _ in range(num_rounds):
        for j, steps in enumerate(local_steps):
            for _ in range(steps):
                t[j] += 1
                x[j] = optimizers[j].step(x[j], gradient(x, t[j])[j])
        x = global_mean(x)
        means.append(x[0].copy())
    return np.array(means)
