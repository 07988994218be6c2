"""Problems for the oracle comparisons: gradients for all learners in NumPy, and the same model in torch."""

import functools

import numpy as np
import torch
from torch import nn


@functools.cache
def drawn(seed, learner, t, num_samples, size):
    """Return the indices of a mini-batch."""
    return np.random.default_rng([seed, learner, t]).integers(num_samples, size=size)


class Quadratic:
    """Deterministic; every learner has its own minimum and curvature."""

    def __init__(self, num_learners):
        generator = np.random.default_rng(11)
        self.x0 = generator.standard_normal(7)
        self.curvature = generator.uniform(0.5, 2.0, (num_learners, 7))
        self.minimum = generator.standard_normal((num_learners, 7))

    def gradient(self, x, t):
        return self.curvature * (x - self.minimum)

    def losses(self, x, t):
        return 0.5 * (self.curvature * (x - self.minimum) ** 2).sum(axis=1)

    def module(self):
        return Vector(self.x0)

    def loss(self, module, learner, t):
        curvature, minimum = torch.tensor(self.curvature[learner]), torch.tensor(self.minimum[learner])
        return 0.5 * (curvature * (module.x - minimum) ** 2).sum()


class Logistic:
    """Logistic regression on mini-batches of a seeded set, a different batch for every learner and step."""

    batch = 5

    def __init__(self, num_learners):
        generator = np.random.default_rng(12)
        self.num_learners = num_learners
        self.inputs = generator.standard_normal((60, 6))
        self.labels = np.sign(generator.standard_normal(60))
        self.x0 = generator.standard_normal(6)

    def batch_of(self, learner, t):
        return drawn(13, learner, t, 60, self.batch)

    def gradient(self, x, t):
        gradients = np.empty_like(x)
        for learner in range(self.num_learners):
            index = self.batch_of(learner, t)
            a, y = self.inputs[index], self.labels[index]
            gradients[learner] = (-(y / (1 + np.exp(y * (a @ x[learner])))) @ a) / self.batch
        return gradients

    def losses(self, x, t):
        losses = np.empty(self.num_learners)
        for learner in range(self.num_learners):
            index = self.batch_of(learner, t)
            losses[learner] = np.logaddexp(0, -self.labels[index] * (self.inputs[index] @ x[learner])).mean()
        return losses

    def module(self):
        return Vector(self.x0)

    def loss(self, module, learner, t):
        index = self.batch_of(learner, t)
        a, y = torch.tensor(self.inputs[index]), torch.tensor(self.labels[index])
        return nn.functional.softplus(-y * (a @ module.x)).mean()


class TwoLayers:
    """A network with one hidden tanh layer and squared error; its parameters are four tensors of odd sizes."""

    shapes = ((5, 3), (5,), (2, 5), (2,))

    def __init__(self, num_learners):
        generator = np.random.default_rng(14)
        self.num_learners = num_learners
        self.inputs = generator.standard_normal((40, 3))
        self.targets = generator.standard_normal((40, 2))
        self.x0 = 0.5 * generator.standard_normal(sum(int(np.prod(shape)) for shape in self.shapes))

    def batch_of(self, learner, t):
        return drawn(15, learner, t, 40, 4)

    def unpack(self, x):
        parts, start = [], 0
        for shape in self.shapes:
            parts.append(x[start : start + int(np.prod(shape))].reshape(shape))
            start += parts[-1].size
        return parts

    def gradient(self, x, t):
        gradients = np.empty_like(x)
        for learner in range(self.num_learners):
            index = self.batch_of(learner, t)
            inputs, targets = self.inputs[index], self.targets[index]
            w1, b1, w2, b2 = self.unpack(x[learner])
            hidden = np.tanh(inputs @ w1.T + b1)
            error = 2 * (hidden @ w2.T + b2 - targets) / targets.size
            back = (error @ w2) * (1 - hidden**2)
            parts = [back.T @ inputs, back.sum(axis=0), error.T @ hidden, error.sum(axis=0)]
            gradients[learner] = np.concatenate([part.ravel() for part in parts])
        return gradients

    def losses(self, x, t):
        losses = np.empty(self.num_learners)
        for learner in range(self.num_learners):
            index = self.batch_of(learner, t)
            w1, b1, w2, b2 = self.unpack(x[learner])
            output = np.tanh(self.inputs[index] @ w1.T + b1) @ w2.T + b2
            losses[learner] = ((output - self.targets[index]) ** 2).mean()
        return losses

    def module(self):
        module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        with torch.no_grad():
            for parameter, values in zip(module.parameters(), self.unpack(self.x0), strict=True):
                parameter.copy_(torch.tensor(values))
        return module

    def loss(self, module, learner, t):
        index = self.batch_of(learner, t)
        return nn.functional.mse_loss(module(torch.tensor(self.inputs[index])), torch.tensor(self.targets[index]))


class Vector(nn.Module):
    """One parameter vector."""

    def __init__(self, values):
        super().__init__()
        self.x = nn.Parameter(torch.tensor(values, dtype=torch.float64))


class Learner:
    """A learner of a stack, as the losses take it: callable, with its part of the parameters as attributes."""

    def __init__(self, stacked, row):
        self._stacked, self._row = stacked, row

    def __call__(self, inputs):
        return self._stacked.learner(self._row)(inputs)

    def __getattr__(self, name):
        return getattr(self._stacked.module, name)[self._row]


PROBLEMS = {"quadratic": Quadratic, "logistic": Logistic, "two_layers": TwoLayers}


def stacked_loss(problem, stacked, learners, t):
    """Return the losses of the learners of a stack, shape (learners,)."""
    return torch.stack([problem.loss(Learner(stacked, row), learner, t) for row, learner in enumerate(learners)])


def values_of(module):
    """Return all parameters of `module` as one NumPy vector (a copy)."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).numpy().copy()


def rows_of(stacked):
    """Return all parameters of each learner of a stack, as rows (a copy)."""
    return torch.cat([p.detach().reshape(stacked.learners, -1) for p in stacked.parameters()], dim=1).numpy().copy()
