"""The paper's bounds on squared gradient norms, the conditions of its theorems, and the norms of runs on problems."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Finding, Line, Plot, Results
from hpcavg.experiments.run import Result, Run
from hpcavg.experiments.verdict import Comparison, Judgement

LEAST_GAIN_PERCENT = 0.1
"""A smaller gain is none that anybody would measure."""
SCALING = (
    "The problems have 32 dimensions, so that L, M and F* are known; the numbers of learners and the conditions on the"
    " rate are the theorem's."
)


def bound_of_all_steps(result: Result) -> float:
    """Return the right side of (3.2) of Theorem 3.1, with M_G^2 the second moment of a gradient."""
    have, known = result["settings"], result["constants"]
    rate, smoothness = have["rate"], known["smoothness"]
    return (
        2 * known["start_gap"] / (rate * have["steps"])
        + 4 * (smoothness * rate * have["k2"]) ** 2 * known["second_moment"]
        + smoothness * rate * known["variance"] / (have["learners"] * have["batch_size"])
    )


def bound_at_global_means(result: Result) -> float:
    """Return the right side of (3.6) of Theorem 3.2, with the largest delta that the theorem allows."""
    k2 = result["settings"]["k2"]
    return _bound(result, k2 * (k2 - 1) / 2)


def bound_with_one_delta(result: Result) -> float:
    """Return the right side of (3.6) with delta = L^2 rate^2 for every K2, as the proofs of later theorems take it."""
    return _bound(result, 1.0)


def _bound(result: Result, times: float) -> float:
    """Return the right side of (3.6), with so many times L^2 rate^2 for delta."""
    have, known = result["settings"], result["constants"]
    rate, k1, k2, smoothness = have["rate"], have["k1"], have["k2"], known["smoothness"]
    left = k2 - times * (smoothness * rate) ** 2
    return (
        2 * known["start_gap"] / (have["steps"] // k2 * left * rate)
        + smoothness * rate * known["variance"] * k2**2 / (have["learners"] * have["batch_size"] * left)
        + (smoothness * rate) ** 2
        * known["variance"]
        * k2
        / (12 * have["batch_size"] * left)
        * ((k2 - k1) * (4 * k2 + k1 - 3) / have["group_size"] + (k1 - 1) * (3 * k2 + k1 - 2))
    )


def room_of_rate(rate: float, k2: int, smoothness: float = 1.0) -> float:
    """Return the left side of condition (3.5), for the delta that makes it smallest.

    The rate is small enough if it is not below 0.
    """
    of_step = smoothness * rate
    return 1 - of_step**2 * (k2 * (k2 - 1) / 2 - 1) - of_step * k2


def excess_of_start(options: Mapping[str, Any], constants: Mapping[str, float]) -> float:
    """Return the left side of condition (3.11) over the right: above 1, some K2 > 1 has a smaller bound than 1.

    Parameters
    ----------
    options : of a run: learners, batch_size, rate, steps, group_size.
    constants : of its problem.
    """
    rate, of_step = options["rate"], options["rate"] * constants["smoothness"]
    delta = of_step**2
    left = delta * constants["start_gap"] / (options["steps"] * rate * (1 - delta))
    of_mean = 2 * of_step / (options["learners"] * options["batch_size"])
    of_group = of_step**2 / (options["batch_size"] * options["group_size"])
    return left / ((of_mean + of_group) * constants["variance"])


def norm_of_all_steps(result: Result) -> float:
    """Return the mean of |grad F|^2 at the mean of the learners, over the steps 0 to T - 1."""
    return float(np.mean(result["gradient_norm2"]))


def norm_at_global_means(result: Result) -> float:
    """Return the mean of |grad F|^2 over the points from which the learners start together."""
    have = result["settings"]
    return float(np.mean(result["gradient_norm2"][: have["steps"] // have["k2"] * have["k2"] : have["k2"]]))


def by_arm(results: Results, value: Callable[[Result], float]) -> dict[str, NDArray[Any]]:
    """Return a value of the runs: by arm, one for each seed."""
    return {arm: np.array([value(result) for result in runs]) for arm, runs in results.items()}


def slope(what: str, parameter: Sequence[float], norms: Sequence[NDArray[Any]], sign: int, margin: float) -> Comparison:
    """Return the comparison of how many times norms double, seed by seed, when the parameter doubles.

    Parameters
    ----------
    what : names the slope.
    parameter : at least two values.
    norms : for each of them, a norm for each seed.
    sign : 1 if norms should rise, -1 if they should fall.
    margin : what the slope, times sign, must exceed.
    """
    slopes = np.polyfit(np.log2(parameter), np.log2(np.array(norms)), 1)[0]
    return Comparison(what, (sign * slopes).tolist(), margin)


def finding(
    results: Results, judgement: Judgement, norms: Mapping[str, NDArray[Any]], bounds: Mapping[str, NDArray[Any]]
) -> Finding:
    """Return the finding: a table of norms, of bounds and of the part that norms are of them, and the curves."""
    rows = [
        [arm, f"{of_arm.mean():.3g}", f"{bounds[arm].mean():.3g}", f"{100 * (of_arm / bounds[arm]).mean():.1f}"]
        for arm, of_arm in norms.items()
    ]
    problems: dict[str, list[Line]] = {}
    for arm in results:
        line = Line(
            arm, results.values_of(arm, "curves", "step")[0], results.values_of(arm, "curves", "gradient_norm2")
        )
        problems.setdefault(arm.partition(",")[0], []).append(line)
    plots = [
        Plot(problem, "step", "squared gradient norm", lines, is_y_log=True, title=problem)
        for problem, lines in problems.items()
    ]
    heads = ("problem, setting", "squared gradient norm", "bound", "part of the bound, %")
    return Finding(judgement, heads, rows, plots)


def made_up(
    arms: Mapping[str, Callable[[int], Run]], norm: Callable[[str, Result], float], spread: float = 1e-3, seeds: int = 5
) -> Results:
    """Return made-up results of runs on problems, for `Experiment.pretend`.

    Parameters
    ----------
    arms : of which only the settings are used.
    norm : returns the squared gradient norm of an arm, which it has at every step. It gets the arm and a result without
        norms.
    spread : the part of the norm by which seeds vary about it.
    seeds : number of seeds.
    """
    generator = np.random.default_rng(0)
    constants = {"smoothness": 1.0, "start_gap": 50.0, "variance": 64.0, "second_moment": 110.0}
    found = {}
    for arm, make in arms.items():
        settings = make(0).options
        base = norm(arm, {"settings": settings, "constants": constants})
        found[arm] = [
            {
                "settings": settings,
                "constants": constants,
                "gradient_norm2": [each] * settings["steps"],
                "curves": {"step": [0.0, 1.0], "gradient_norm2": [each, each]},
            }
            for each in base * (1 + spread * generator.standard_normal(seeds))
        ]
    return Results(found)
