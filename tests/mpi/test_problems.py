"""Problems of theorems on several ranks: the split of the learners does not change a run."""

import numpy as np
import pytest
from mpi4py import MPI

from hpcavg.errors import InputError
from hpcavg.experiments.problems import Logistic, Quadratic, run

pytestmark = pytest.mark.mpi


def quadratic():
    return Quadratic(np.linspace(0.1, 2, 20), np.linspace(-1, 1, 20), noise=2.0, ripple=0.5)


def logistic():
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((100, 10))
    return Logistic(inputs, generator.random(100) < 0.5, 0.1)


@pytest.mark.parametrize("make", [quadratic, logistic])
@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("k_avg", {"k": 4}),
        ("hier_avg", {"k1": 2, "k2": 6}),
        ("dasgd", {}),
        ("pr_sgd_hetero", {"local_steps": [1, 3] * 24}),
    ],
)
def test_the_same_curves_on_one_rank_and_on_all(world, make, algorithm, options):
    learners = 48  # in groups of two, on 1, 2, 3, 4 and 8 ranks
    arguments = (make(), algorithm, options, learners)
    more = {"steps": 30, "batch_size": 3, "rate": 0.1, "seed": 5, "group_size": None if "k1" not in options else 2}
    spread, alone = run(world, *arguments, **more), run(MPI.COMM_SELF, *arguments, **more)
    assert spread["step"] == alone["step"]
    assert len(spread["step"]) > 3
    for name in ("gap", "gradient_norm2"):
        assert spread[name] == pytest.approx(alone[name], rel=1e-10)
    assert spread["consensus"] == pytest.approx(alone["consensus"], rel=1e-9, abs=1e-25)
    assert world.allgather(spread) == [spread] * world.Get_size()


def test_learners_that_cannot_be_divided_among_the_ranks(world):
    learners = world.Get_size() + 1
    if world.Get_size() > 1:
        with pytest.raises(InputError, match=f"^learners={learners}: must be a multiple of the {learners - 1} ranks"):
            run(world, quadratic(), "k_avg", {}, learners, 3, 1, 0.1, 0)
