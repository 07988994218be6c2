"""Figure 5: the best K falls as learners are added."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Results
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.k_avg.choice_of_k import arms_with, by_k
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import Comparison, all_of, exceeds


def judge(results: Results) -> Finding:
    """Fit, for each seed and network, a line through the logarithms of the best K against those of P.

    With the fewest learners, the best K must be more than noise.
    """
    found = by_k(results)
    best: dict[str, dict[int, NDArray[Any]]] = {}
    for (model, learners), of_k in found.items():
        of_seed = np.argmax(np.stack(list(of_k.values())), axis=0)
        best.setdefault(model, {})[learners] = np.array(list(of_k), float)[of_seed]
    comparisons, rows = [], []
    for model, by_learners in best.items():
        falls = -np.polyfit(np.log2(list(by_learners)), np.log2(np.stack(list(by_learners.values()))), 1)[0]
        comparisons.append(Comparison(f"halvings of the best K for each doubling of P, {model}", falls.tolist()))
        fewest = min(by_learners)
        of_k = found[model, fewest]
        _, accuracy = setting.best_on_others(of_k)
        what = f"accuracy of the best K on the other seeds less that of K = {min(of_k)}, {model}, P = {fewest}"
        comparisons.append(exceeds(what, accuracy, of_k[min(of_k)]))
        rows += [
            (model, str(learners), ", ".join(f"{k:.0f}" for k in of_seed)) for learners, of_seed in by_learners.items()
        ]
    plot = setting.plot_of("best-k", "learners", best, "best K")
    return Finding(all_of(*comparisons), ("network", "P", "best K of each seed"), rows, [plot])


def pretend(holds: bool) -> Results:
    """Return results in which the best K falls, or rises."""
    best = {8: 16, 64: 4} if holds else {8: 4, 64: 16}
    return made_up({f"mlp, P = {p}, K = {k}": 0.9 if k == best[p] else 0.89 for p in best for k in (1, 4, 16)})


EXPERIMENT = Experiment(
    name="k-avg-figures-5-6-best-k-by-learners",
    paper="k-avg",
    where="Section 4.2, Figures 5 and 6",
    claim="The best K falls as learners are added.",
    saw="With vgg the best K tends to decrease as P grows: 32 with P = 8, 2 with P = 64, 4 with P = 128. With nin it is"
    " 8 with P = 8 and 1 with all others.",
    rule="For each seed, a line is fitted through the logarithms of the best K against those of P. It holds if the"
    " lines of both networks fall on average, and if with the fewest learners the K that is best on the other seeds is"
    " more accurate than K = 1. It fails if one of these is not so.",
    scaling=f"{setting.SCALING} {setting.LEFT_OUT}",
    arms=lambda scale: arms_with(scale, *setting.MODELS),
    judge=judge,
    pretend=pretend,
    recipes=("k-avg/figure5", "k-avg/figure6"),
)
