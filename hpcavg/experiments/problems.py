"""Problems whose constants are known, to compare runs with theorems. All in float64."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from hpcavg import algorithms
from hpcavg.averaging.averager import Averager
from hpcavg.averaging.stacked import stack
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError, require_integer

Array = NDArray[np.float64]


class Problem(ABC):
    """A function F of d numbers, of which learners see gradients with noise.

    Methods take the points of several learners, shape (learners, d).

    Attributes
    ----------
    num_dimensions : d.
    smoothness : L, the smallest Lipschitz constant of the gradient that is known.
    strong_convexity : mu, 0 if F is not strongly convex.
    """

    num_dimensions: int
    smoothness: float
    strong_convexity: float

    @property
    @abstractmethod
    def minimum(self) -> float:
        """The smallest value of F."""

    @abstractmethod
    def value(self, points: Array) -> Array:
        """Return F, shape (learners,)."""

    @abstractmethod
    def gradient(self, points: Array) -> Array:
        """Return the gradients of F, shape (learners, d)."""

    @abstractmethod
    def variance(self, point: Array) -> float:
        """Return sigma^2 at a point of shape (d,): the mean of |g - grad F|^2 for the gradient g of one sample."""

    @abstractmethod
    def draw(self, generator: np.random.Generator, batch_size: int) -> NDArray[Any]:
        """Return the mini-batch of one learner's step."""

    @abstractmethod
    def sampled(self, points: Array, batches: NDArray[Any]) -> tuple[Array, Array]:
        """Return losses and gradients of mini-batches, which `draw` returned for each learner."""


class Quadratic(Problem):
    """F(w) = sum_i a_i u_i^2 / 2 + b (1 - cos u_i), u = w - c: a quadratic, and for b > 0 ripples on it.

    A sample's gradient is that of F plus Gaussian noise, the same in all directions. The minimum is 0, at c. With
    b > min a, F is not convex and may have local minima.

    Parameters
    ----------
    curvatures : array
        The numbers a_i > 0.
    centre : array
        c.
    noise : float
        sigma^2 of one sample, of all directions together.
    ripple : float
        b, at least 0. The second derivatives are from min a - b to max a + b.

    Examples
    --------
    >>> import numpy as np
    >>> from hpcavg.experiments.problems import Quadratic
    >>> problem = Quadratic(np.array([1.0, 4.0]), np.zeros(2), noise=0.5)
    >>> problem.smoothness, problem.strong_convexity, problem.value(np.array([[2.0, 1.0]]))
    (4.0, 1.0, array([4.]))
    """

    minimum = 0.0

    def __init__(self, curvatures: Array, centre: Array, noise: float = 0.0, ripple: float = 0.0) -> None:
        self._curvatures, self._centre = np.asarray(curvatures, float), np.asarray(centre, float)
        self._noise, self._ripple = noise, ripple
        self.num_dimensions = len(self._curvatures)
        self.smoothness = float(self._curvatures.max() + ripple)
        self.strong_convexity = max(0.0, float(self._curvatures.min() - ripple))

    def value(self, points: Array) -> Array:
        """Return F, shape (learners,)."""
        u = points - self._centre
        return (self._curvatures * u**2 / 2 + self._ripple * (1 - np.cos(u))).sum(axis=1)

    def gradient(self, points: Array) -> Array:
        """Return a u + b sin u, shape (learners, d)."""
        u = points - self._centre
        return self._curvatures * u + self._ripple * np.sin(u)

    def variance(self, point: Array) -> float:
        """Return sigma^2, the same everywhere."""
        return self._noise

    def draw(self, generator: np.random.Generator, batch_size: int) -> Array:
        """Return the noise of a mini-batch's gradient, whose variance is sigma^2 / batch size."""
        scale = np.sqrt(self._noise / (batch_size * self.num_dimensions))
        return scale * generator.standard_normal(self.num_dimensions)

    def sampled(self, points: Array, batches: Array) -> tuple[Array, Array]:
        """Return F without noise, and gradients with it."""
        return self.value(points), self.gradient(points) + batches


class Logistic(Problem):
    """F(w) = mean_j log(1 + exp(-y_j x_j.w)) + l2 |w|^2 / 2: logistic regression. A sample is one of the rows x_j.

    L is a quarter of the largest eigenvalue of X'X / n, plus l2; mu is l2.

    Parameters
    ----------
    inputs : array
        X, shape (n, d).
    targets : array
        0 (for y = -1) or 1, shape (n,).
    l2 : float
        The strength of the L2 term, above 0.
    """

    def __init__(self, inputs: Array, targets: NDArray[Any], l2: float) -> None:
        if not l2 > 0:
            raise InputError("l2", l2, "above 0: without it, there may be no minimum")
        self._rows = np.asarray(inputs, float) * (2.0 * np.asarray(targets) - 1)[:, None]  # y_j x_j
        self._l2 = l2
        self.num_dimensions = self._rows.shape[1]
        self.smoothness = float(np.linalg.norm(self._rows, 2) ** 2 / (4 * len(self._rows)) + l2)
        self.strong_convexity = l2

    @cached_property
    def minimiser(self) -> Array:
        """The point with the smallest F. The value there is right to 1e-12."""
        from scipy.optimize import minimize  # slow to import, and not needed by all runs

        def hessian(point: Array) -> Array:
            of_loss = _sigmoid(self._rows @ point) * _sigmoid(-self._rows @ point)
            matrix = (self._rows.T * of_loss) @ self._rows / len(self._rows)
            return matrix + self._l2 * np.eye(self.num_dimensions)

        found = minimize(
            lambda point: self.value(point[None])[0],
            np.zeros(self.num_dimensions),
            jac=lambda point: self.gradient(point[None])[0],
            hess=hessian,
            method="trust-exact",
            options={"gtol": 1e-6 * np.sqrt(2 * self._l2)},  # F is at most |gradient|^2 / (2 mu) above its minimum
        )
        if not found.success:
            raise RuntimeError(f"no minimum was found: {found.message}")
        return found.x

    @cached_property
    def minimum(self) -> float:
        """The smallest value of F, to 1e-12."""
        return float(self.value(self.minimiser[None])[0])

    def value(self, points: Array) -> Array:
        """Return F, shape (learners,)."""
        return np.logaddexp(0, -points @ self._rows.T).mean(axis=1) + self._l2 / 2 * (points**2).sum(axis=1)

    def gradient(self, points: Array) -> Array:
        """Return the gradients of F, shape (learners, d)."""
        return self._l2 * points - _sigmoid(-points @ self._rows.T) @ self._rows / len(self._rows)

    def variance(self, point: Array) -> float:
        """Return sigma^2 at a point: the mean over all samples, exactly."""
        slopes = _sigmoid(-self._rows @ point)
        mean = slopes @ self._rows / len(self._rows)
        return float((slopes**2 * (self._rows**2).sum(axis=1)).mean() - (mean**2).sum())

    def draw(self, generator: np.random.Generator, batch_size: int) -> NDArray[np.int64]:
        """Return the numbers of the samples of a mini-batch, drawn with replacement."""
        return generator.integers(len(self._rows), size=batch_size)

    def sampled(self, points: Array, batches: NDArray[np.int64]) -> tuple[Array, Array]:
        """Return losses and gradients of mini-batches of shape (learners, batch size)."""
        rows = self._rows[batches]
        margins = (rows @ points[:, :, None])[:, :, 0]
        of_loss = (_sigmoid(-margins)[:, None] @ rows)[:, 0] / batches.shape[1]
        losses = np.logaddexp(0, -margins).mean(axis=1) + self._l2 / 2 * (points**2).sum(axis=1)
        return losses, self._l2 * points - of_loss


def _sigmoid(x: Array) -> Array:
    """Return 1 / (1 + exp(-x)), without overflows."""
    return 0.5 + 0.5 * np.tanh(x / 2)


class _Point(torch.nn.Module):
    """A model that is a point: its parameter."""

    def __init__(self, point: Array) -> None:
        super().__init__()
        self.point = torch.nn.Parameter(torch.from_numpy(point.copy()))


def run(
    comm: MPI.Intracomm,
    problem: Problem,
    algorithm: str,
    options: Mapping[str, Any],
    learners: int,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
    start: Array | None = None,
    group_size: int | None = None,
    max_points: int = 400,
    **changes: Any,
) -> dict[str, Any]:
    """Train a problem with SGD and one of our algorithms, and measure the mean of the learners' points exactly.

    What a learner draws depends on the seed and the learner alone: learners may be on any number of ranks. Only an
    algorithm that measures the learners' speed gives other curves in another run. Collective.

    Parameters
    ----------
    comm : MPI.Intracomm
        The ranks, among which the learners are divided evenly.
    problem : Problem
        The problem, the same on every rank.
    algorithm : str
        A name of `hpcavg.algorithms`.
    options : mapping
        The algorithm's options.
    learners : int
        Number of learners.
    steps : int
        Steps of every learner.
    batch_size : int
        Samples of a learner's step.
    rate : float
        The learning rate; some algorithms set their own.
    seed : int
        The learners' noise depends on it.
    start : array
        The point where all learners start, shape (d,). None: zero.
    group_size : int
        Learners of a local group; see `hpcavg.Topology`.
    max_points : int
        The curves have at most as many points, besides the start.
    **changes : Any
        Options of `hpcavg.AveragingOptions`.

    Returns
    -------
    dict
        The curves as lists of numbers: ``step``, the steps that every learner had taken; ``gradient_norm2``, the
        squared norm of the gradient of F at the mean point; ``gap``, F there above its minimum; ``consensus``, the
        learners' mean squared distance from the mean point. Where learners take different numbers of steps, the curves
        have points at global means alone, and ``step`` is the mean learner's.

    Raises
    ------
    InputError
        An argument cannot be used.

    Examples
    --------
    >>> import numpy as np
    >>> from mpi4py import MPI
    >>> from hpcavg.experiments import problems
    >>> bowl = problems.Quadratic(np.array([1.0, 2.0]), np.array([3.0, 1.0]))
    >>> curves = problems.run(MPI.COMM_SELF, bowl, "k_avg", {"k": 2}, 4, steps=2, batch_size=1, rate=0.5, seed=0)
    >>> curves["step"], curves["gap"], curves["consensus"]
    ([0, 1, 2], [5.5, 1.125, 0.28125], [0.0, 0.0, 0.0])
    """
    for name, value in (("steps", steps), ("batch_size", batch_size), ("max_points", max_points)):
        require_integer(name, value, 1)
    if learners < 1 or learners % comm.Get_size():
        raise InputError("learners", learners, f"a multiple of the {comm.Get_size()} ranks")
    topology = Topology(comm, group_size, learners_per_rank=learners // comm.Get_size())
    try:
        model = stack(_Point(np.zeros(problem.num_dimensions) if start is None else start), len(topology.learners))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        rule = algorithms.build(algorithm, options)
        averager = Averager(
            model, optimizer, rule, topology, total_steps=steps, batch_size=batch_size, seed=seed, **changes
        )
        generators = [np.random.default_rng([seed, learner]) for learner in topology.learners]
        curves: dict[str, list[float]] = {"step": [], "gradient_norm2": [], "gap": [], "consensus": []}
        (parameter,) = model.parameters()
        gradients, losses = torch.zeros_like(parameter), torch.zeros(len(topology.learners), dtype=torch.float64)
        parameter.grad = gradients
        step: float | None = 0
        due = 0.0
        while True:
            points = parameter.detach().numpy()
            if step is not None and (step >= due or averager.done):
                _measure(curves, step, problem, _gathered(topology, points))
                due = step + -(-steps // max_points)
            if averager.done:
                break
            rows = averager.active
            batches = np.stack([problem.draw(generators[row], batch_size) for row in rows])
            losses.numpy()[rows], gradients.numpy()[rows] = problem.sampled(points[rows], batches)
            averager.step(losses)
            step = averager.agreed_step
        averager.finish()
    finally:
        topology.free()
    return curves


def _gathered(topology: Topology, points: Array) -> Array:
    """Return the points of all learners. Every rank then takes the same mean, however many ranks there are."""
    found = np.empty((topology.num_learners, points.shape[1]))
    topology.learner_ranks.Allgather(np.ascontiguousarray(points), found)
    return found


def _measure(curves: dict[str, list[float]], step: float, problem: Problem, points: Array) -> None:
    mean = points.mean(axis=0, keepdims=True)
    curves["step"].append(step)
    curves["gradient_norm2"].append(float((problem.gradient(mean) ** 2).sum()))
    curves["gap"].append(float(problem.value(mean)[0] - problem.minimum))
    curves["consensus"].append(float(((points - mean) ** 2).sum(axis=1).mean()))
