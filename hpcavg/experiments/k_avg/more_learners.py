"""Figures 1 and 2: algorithms with a parameter server lose accuracy as learners are added."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with the fewest and the most learners, at a tenth of the other figures' rate."""
    return {
        f"{name} {model}, P = {learners}": setting.run_of(scale, model, learners, setting.SMALL_RATES, **algorithm)
        for model in setting.MODELS
        for name, algorithm in setting.servers().items()
        for learners in setting.few_and_most(scale)
    }


def judge(results: Results) -> Finding:
    """Compare each algorithm with itself."""
    accuracy = setting.accuracies(results)
    lines: dict[str, dict[int, NDArray[Any]]] = {}
    for arm, of_arm in accuracy.items():
        name, learners = setting.split(arm)
        lines.setdefault(name, {})[learners] = of_arm
    comparisons = []
    for name, by_learners in lines.items():
        (fewest, of_fewest), *_, (most, of_most) = by_learners.items()
        comparisons.append(exceeds(f"accuracy of {name}, P = {fewest}, less that of P = {most}", of_fewest, of_most))
    plot = setting.plot_of("accuracy", "learners", lines)
    return Finding(all_of(*comparisons), setting.HEADS, setting.table(results), [plot])


def pretend(holds: bool) -> Results:
    """Return results in which accuracies fall by a point, or that of one algorithm rises."""
    rise = {"Downpour": -0.01, "EAMSGD": -0.01 if holds else 0.01}
    return made_up({f"{name} mlp, P = {p}": 0.6 + by * (p == 128) for name, by in rise.items() for p in (8, 128)})


EXPERIMENT = Experiment(
    name="k-avg-figures-1-2-more-learners",
    paper="k-avg",
    where="Section 4.1, Figures 1 and 2; Theorem 3.3",
    claim="Downpour and EAMSGD lose accuracy as learners are added.",
    saw="The accuracies of Downpour and EAMSGD fall from P = 8 to 128, to around 10 % with both networks; with vgg more"
    " than with nin.",
    rule="It holds if, with both networks, Downpour and EAMSGD are less accurate with the most learners than with the"
    " fewest, at a tenth of the rate of K-AVG. It fails if one of them is more accurate.",
    scaling=f"{setting.SCALING} The rate is a tenth of that of K-AVG, since in a pilot run Downpour with 8"
    f" learners does not train at the latter. P = 16, 32 and 64 are left out. {setting.SIMULATED}",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("k-avg/figure1-downpour", "k-avg/figure1-eamsgd", "k-avg/figure2-downpour", "k-avg/figure2-eamsgd"),
)
