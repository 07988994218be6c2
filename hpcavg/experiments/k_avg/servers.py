"""Figures 1 and 2: K-AVG is more accurate than algorithms with a parameter server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds


def experiment(figure: int, model: str, network: str) -> Experiment:
    """Return the experiment of a figure.

    Parameters
    ----------
    figure : its number.
    model : the network of these runs.
    network : the network of the paper's.
    """

    def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
        return {
            f"{name}, P = {learners}": setting.run_of(scale, model, learners, **algorithm)
            for name, algorithm in {"K-AVG": setting.k_avg(), **setting.servers()}.items()
            for learners in setting.few_and_most(scale)
        }

    return Experiment(
        name=f"k-avg-figure-{figure}",
        paper="k-avg",
        where=f"Section 4.1, Figure {figure}",
        claim="At each number of learners K-AVG is more accurate than Downpour and EAMSGD with the same rates.",
        saw=f"With {network}, P = 8 to 128, K = 16 and the same rates for all, K-AVG always achieves the best test"
        " accuracy. At P = 128 the others are both around 10 %, a random guess.",
        rule="It holds if K-AVG is more accurate than Downpour and EAMSGD at each P. It fails if one of them is more"
        " accurate than K-AVG. The rates are the best for K-AVG; k-avg-figures-1-2-own-rate gives each its own.",
        scaling=f"{setting.SCALING} P = 16, 32 and 64 are left out. {setting.SIMULATED}",
        arms=arms,
        judge=judge,
        pretend=pretend,
        recipes=tuple(f"k-avg/figure{figure}-{name}" for name in ("k-avg", "downpour", "eamsgd")),
    )


def judge(results: Results) -> Finding:
    """Compare K-AVG with each of the others at each P."""
    accuracy = setting.accuracies(results)
    lines: dict[str, dict[int, NDArray[Any]]] = {}
    for arm, of_arm in accuracy.items():
        name, learners = setting.split(arm)
        lines.setdefault(name, {})[learners] = of_arm
    first, *others = lines
    comparisons = [
        exceeds(f"accuracy of {first} less that of {other}, P = {learners}", lines[first][learners], of_arm)
        for other in others
        for learners, of_arm in lines[other].items()
    ]
    plot = setting.plot_of("accuracy", "learners", lines)
    return Finding(all_of(*comparisons), setting.HEADS, setting.table(results), [plot])


def pretend(holds: bool) -> Results:
    """Return results in which the others are worse by a point, or one of them is better once."""
    once = 0.89 if holds else 0.91
    found = {"K-AVG": (0.9, 0.9), "Downpour": (once, 0.89), "EAMSGD": (0.89, 0.89)}
    return made_up(
        {
            f"{name}, P = {learners}": accuracy
            for name, accuracies in found.items()
            for learners, accuracy in zip((8, 128), accuracies, strict=True)
        }
    )


FIGURE_1 = experiment(1, "mlp", "vgg")
FIGURE_2 = experiment(2, "cnn1d", "nin")
