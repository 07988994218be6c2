"""Figures 5 and 6: with few learners the choice of K hardly matters; with many, a large K costs accuracy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, less, made_up, more
from hpcavg.experiments.verdict import all_of

# Percent of the errors that a K must cost if its choice does matter: four times what counts as nothing.
_LARGE = 4 * SHARE_PERCENT


def arms_with(scale: Scale, *models: str) -> Mapping[str, Callable[[int], Run]]:
    """Return the runs of K-AVG with all K and P."""
    return {
        f"{model}, P = {learners}, K = {k}": setting.run_of(scale, model, learners, **setting.k_avg(k))
        for model in models
        for learners in setting.learners(scale)
        for k in scale.pick((1, 4, 16, 64), (1, 16, 64))
    }


def by_k(results: Results) -> dict[tuple[str, int], dict[int, NDArray[Any]]]:
    """Return the accuracies: by network and P, and then by K, a value for each seed."""
    found: dict[tuple[str, int], dict[int, NDArray[Any]]] = {}
    for arm, accuracy in setting.accuracies(results).items():
        model, learners, k = setting.split(arm)
        found.setdefault((model, learners), {})[k] = accuracy
    return found


def experiment(figure: int, model: str, saw: str, pretend: Callable[[bool], Results]) -> Experiment:
    """Return the experiment of a figure.

    Parameters
    ----------
    figure : its number.
    model : the network of these runs.
    saw : what the paper saw.
    pretend : makes results up.
    """
    return Experiment(
        name=f"k-avg-figure-{figure}",
        paper="k-avg",
        where=f"Section 4.2, Figure {figure}",
        claim="With few learners the choice of K hardly matters; with many, a K that is too large costs much accuracy.",
        saw=saw,
        rule="The best K of a P is that of the highest mean accuracy. It holds if, with the fewest learners, every K"
        f" leaves at most {SHARE_PERCENT:.0f} % more test errors than the best, and with the most learners the largest"
        f" K leaves over {_LARGE:.0f} % more than the best. It fails if one of these is not so.",
        scaling=f"{setting.SCALING} {setting.LEFT_OUT}",
        arms=lambda scale: arms_with(scale, model),
        judge=judge,
        pretend=pretend,
        recipes=(f"k-avg/figure{figure}",),
    )


def best_of(of_k: Mapping[int, NDArray[Any]]) -> int:
    """Return the K of the highest mean."""
    return max(of_k, key=lambda k: float(of_k[k].mean()))


def judge(results: Results) -> Finding:
    """Compare each K with the best one, with the fewest learners; the largest K, with the most."""
    found = by_k(results)
    (fewest, forgiving), *_, (most, punishing) = ((learners, of_k) for (_, learners), of_k in found.items())
    best = best_of(forgiving)
    comparisons = [
        less(f"errors of K = {k}: below those of K = {best}, P = {fewest}", 1 - of_k, 1 - forgiving[best])
        for k, of_k in forgiving.items()
        if k != best
    ]
    best, largest = best_of(punishing), max(punishing)
    what = f"errors of K = {largest}: above those of K = {best}, P = {most}"
    comparisons.append(more(what, 1 - punishing[largest], 1 - punishing[best], _LARGE))
    lines = {f"P = {learners}": of_k for (_, learners), of_k in found.items()}
    plot = setting.plot_of("accuracy", "K", lines)
    return Finding(all_of(*comparisons), setting.HEADS, setting.table(results), [plot])


def pretend_few(holds: bool) -> Results:
    """Return results in which K = 64 costs few learners half of what it may, or twice as much."""
    return _pretend(2.5 if holds else 10, 40)


def pretend_many(holds: bool) -> Results:
    """Return results in which K = 64 costs many learners twice what it must, or half as much."""
    return _pretend(2.5, 40 if holds else 10)


def _pretend(few: float, many: float) -> Results:
    """Return results in which K = 64 leaves so many percent more errors than K = 1, which leaves 0.3."""
    return made_up(
        {
            f"mlp, P = {p}, K = {k}": 1 - 0.3 * (1 + (more / 100 if k == 64 else 0))
            for p, more in ((8, few), (64, many))
            for k in (1, 64)
        }
    )


FIGURE_5 = experiment(
    5,
    "mlp",
    "With vgg and P = 8 the accuracies of K = 1 to 64 are similar. With P = 128 and K above the best, 4, the accuracy"
    " degrades rapidly.",
    pretend_few,
)
FIGURE_6 = experiment(
    6,
    "cnn1d",
    "With nin and few learners the choice of K is not critical: with P = 8 the best K gains 0.27 % over K = 1. With"
    " many learners the accuracy degrades rapidly as K grows beyond the best.",
    pretend_many,
)
