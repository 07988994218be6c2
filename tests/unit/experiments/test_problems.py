"""Problems of theorems: their constants by hand, and runs on them compared with what must come out."""

import numpy as np
import pytest
from mpi4py import MPI

from hpcavg.errors import InputError
from hpcavg.experiments.problems import Logistic, Quadratic, run

CURVATURES, CENTRE = np.array([0.5, 2.0, 1.0]), np.array([1.0, -2.0, 0.5])


def logistic(num_samples=40, l2=0.05):
    generator = np.random.default_rng(3)
    inputs = generator.standard_normal((num_samples, 3))
    return Logistic(inputs, inputs @ [1.0, 2.0, -1.0] + generator.standard_normal(num_samples) > 0, l2), inputs


PROBLEMS = [Quadratic(CURVATURES, CENTRE, 0.3), Quadratic(CURVATURES, CENTRE, 0.3, ripple=3.0), logistic()[0]]


@pytest.mark.parametrize("problem", PROBLEMS)
def test_gradients_are_those_of_the_values(problem):
    points, step = np.random.default_rng(1).standard_normal((4, 3)), 1e-5
    shifted = [(problem.value(points + step * e) - problem.value(points - step * e)) / (2 * step) for e in np.eye(3)]
    assert problem.gradient(points) == pytest.approx(np.stack(shifted, axis=1), abs=1e-8)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_no_two_gradients_differ_by_more_than_the_smoothness_says(problem):
    generator = np.random.default_rng(2)
    ends = generator.standard_normal((2, 1000, 3)) * 3
    change = np.linalg.norm(problem.gradient(ends[0]) - problem.gradient(ends[1]), axis=1)
    slope = change / np.linalg.norm(ends[0] - ends[1], axis=1)
    assert slope.max() <= problem.smoothness
    assert slope.min() >= problem.strong_convexity
    assert (problem.value(ends[0]) >= problem.minimum).all()


def test_constants_by_hand():
    """At u = 0 the second derivatives are a + b, at u = pi they are a - b."""
    plain, rippled = PROBLEMS[:2]
    assert (plain.smoothness, plain.strong_convexity, plain.minimum) == (2.0, 0.5, 0.0)
    assert (rippled.smoothness, rippled.strong_convexity, rippled.minimum) == (5.0, 0.0, 0.0)
    assert rippled.value(CENTRE[None]) == 0
    assert rippled.value(CENTRE[None] + np.pi) == pytest.approx(np.pi**2 / 2 * 3.5 + 18)
    # The samples x = 1, y = -1 and x = 1, y = 1 are symmetric: w = 0 is best, at log 2. X'X / n = 1.
    pair = Logistic(np.ones((2, 1)), np.array([0, 1]), 0.1)
    assert (pair.smoothness, pair.strong_convexity) == (pytest.approx(0.35), 0.1)
    assert pair.minimum == pytest.approx(np.log(2), abs=1e-15)
    assert pair.variance(np.zeros(1)) == pytest.approx(0.25)  # gradients of 1/2 and -1/2


def test_the_minimum_of_logistic_regression_is_right_to_1e_12():
    problem, _ = logistic()
    gradient = problem.gradient(problem.minimiser[None])
    assert (gradient**2).sum() / (2 * problem.strong_convexity) <= 1e-12
    assert problem.value(problem.minimiser + 1e-4 * np.eye(3)).min() > problem.minimum


def test_samples_of_logistic_regression():
    """The mean gradient over all samples is that of F, and their mean squared distance from it is the variance."""
    problem, inputs = logistic()
    point = np.array([0.3, -1.0, 2.0])
    every = np.arange(len(inputs))[:, None]
    losses, gradients = problem.sampled(np.tile(point, (len(inputs), 1)), every)
    assert losses.mean() == pytest.approx(problem.value(point[None])[0])
    assert gradients.mean(axis=0) == pytest.approx(problem.gradient(point[None])[0])
    assert ((gradients - gradients.mean(axis=0)) ** 2).sum(axis=1).mean() == pytest.approx(problem.variance(point))
    # A mini-batch is the mean of its samples.
    loss, gradient = problem.sampled(point[None], np.array([[4, 4, 7]]))
    assert loss[0] == pytest.approx((2 * losses[4] + losses[7]) / 3)
    assert gradient[0] == pytest.approx((2 * gradients[4] + gradients[7]) / 3)
    drawn = problem.draw(np.random.default_rng(0), 5)
    assert drawn.shape == (5,)
    assert set(drawn) <= set(range(40))


def test_a_mini_batch_divides_the_noise_of_a_quadratic():
    generator, problem = np.random.default_rng(0), PROBLEMS[0]
    for batch_size in (1, 4):
        noise = np.stack([problem.draw(generator, batch_size) for _ in range(20_000)])
        assert (noise**2).sum(axis=1).mean() == pytest.approx(problem.variance(CENTRE) / batch_size, rel=0.05)
        assert noise.mean(axis=0) == pytest.approx(0, abs=0.01)


def test_gradient_descent_without_noise_by_hand():
    """u_i shrinks by 1 - 0.25 a_i in every step."""
    steps = np.arange(6)
    curves = run(MPI.COMM_SELF, Quadratic(CURVATURES, CENTRE), "sync_sgd", {}, 1, 5, 1, rate=0.25, seed=0)
    u = -CENTRE * (1 - 0.25 * CURVATURES) ** steps[:, None]
    assert curves["step"] == steps.tolist()
    assert curves["gap"] == pytest.approx((CURVATURES * u**2 / 2).sum(axis=1), rel=1e-13)
    assert curves["gradient_norm2"] == pytest.approx(((CURVATURES * u) ** 2).sum(axis=1), rel=1e-13)
    assert curves["consensus"] == [0.0] * 6


def test_learners_with_noise_by_an_oracle():
    """Three learners, a mean after every second step; each draws from a generator of its own."""
    problem, rate = Quadratic(CURVATURES, CENTRE, noise=0.3), 0.1
    start = np.array([3.0, 3.0, 3.0])
    curves = run(MPI.COMM_SELF, problem, "k_avg", {"k": 2}, 3, 5, 4, rate, seed=7, start=start)
    generators = [np.random.default_rng([7, learner]) for learner in range(3)]
    points = np.tile(start, (3, 1))
    gaps, consensus = [], []
    for step in range(6):
        mean = points.mean(axis=0)
        gaps.append((CURVATURES * (mean - CENTRE) ** 2).sum() / 2)
        consensus.append(((points - mean) ** 2).sum() / 3)
        noise = np.stack([np.sqrt(0.3 / (4 * 3)) * generator.standard_normal(3) for generator in generators])
        points = points - rate * (CURVATURES * (points - CENTRE) + noise)
        if step % 2:
            points[:] = points.mean(axis=0)
    assert curves["gap"] == pytest.approx(gaps, rel=1e-12)
    assert curves["consensus"] == pytest.approx(consensus, rel=1e-12, abs=1e-28)
    assert min(curves["consensus"][1::2]) > 1e-4


def test_curves_have_at_most_as_many_points_as_asked_for_and_the_last_step():
    problem = Quadratic(CURVATURES, CENTRE)
    for steps, every in ((7, [0, 2, 4, 6, 7]), (8, [0, 2, 4, 6, 8]), (4, [0, 1, 2, 3, 4])):
        assert run(MPI.COMM_SELF, problem, "k_avg", {}, 2, steps, 1, 0.1, 0, max_points=4)["step"] == every


@pytest.mark.parametrize(
    ("algorithm", "options", "changes"),
    [
        ("pr_sgd_hetero", {"local_steps": [1, 2, 3, 4]}, {}),
        ("ada_lupa", {"growth": "loss"}, {}),
        ("dasgd", {}, {}),
        ("hier_avg", {"k1": 2, "k2": 4}, {"group_size": 2}),
        ("downpour", {"n_push": 1, "n_fetch": 1}, {"step_times": "lognormal:0.5"}),
    ],
)
def test_every_kind_of_algorithm_goes_down_to_the_minimum(algorithm, options, changes):
    problem = logistic()[0]
    curves = run(MPI.COMM_SELF, problem, algorithm, options, 4, 200, 16, 0.1, seed=1, **changes)
    assert curves["step"][-1] == 200
    assert curves["gap"][-1] < 0.1 * curves["gap"][0]
    assert curves == run(MPI.COMM_SELF, problem, algorithm, options, 4, 200, 16, 0.1, seed=1, **changes)


@pytest.mark.parametrize("changed", [{"learners": 0}, {"steps": 0}, {"batch_size": 0}, {"max_points": 0}])
def test_arguments_that_cannot_be_used(changed):
    arguments = {"learners": 2, "steps": 3, "batch_size": 1, "max_points": 4, **changed}
    with pytest.raises(InputError) as caught:
        run(MPI.COMM_SELF, PROBLEMS[0], "k_avg", {}, rate=0.1, seed=0, **arguments)
    assert caught.value.option == next(iter(changed))


def test_logistic_regression_needs_its_l2_term():
    with pytest.raises(InputError, match=r"^l2=0: must be above 0"):
        Logistic(np.ones((2, 1)), np.array([0, 1]), 0)
