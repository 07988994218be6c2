"""Hier-AVG with half as many global means matches K-AVG with its best K."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.hier_avg.networks import SCALING, test_errors, trained
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, less, made_up
from hpcavg.experiments.verdict import all_of

# By P, the best K1 of the paper's table, and S.
_LOCAL = {8: (4, 4), 16: (4, 4), 32: (4, 8), 64: (1, 4)}
# By P, the K that are searched. K_opt of the paper's table is among them.
_SEARCHED = {8: (1, 4), 16: (1, 4, 32), 32: (1, 4, 16), 64: (1, 4, 16)}


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of K-AVG with several K, and of Hier-AVG with K2 = 2 K, for several P."""
    model = scale.pick("cnn1d", "mlp")
    found: dict[str, Callable[[int], Run]] = {}
    for learners in scale.pick((16, 32, 64), (8,)):
        k1, size = _LOCAL[learners]
        for k in _SEARCHED[learners]:
            found[_k_avg(learners, k)] = trained(scale, model, learners, algorithm="k-avg", k=k)
            found[_hier_avg(learners, 2 * k)] = trained(
                scale, model, learners, algorithm="hier-avg", k1=min(k1, k), k2=2 * k, group_size=size
            )
    return found


def _k_avg(learners: int, k: int) -> str:
    return f"P = {learners}, K-AVG, K = {k}"


def _hier_avg(learners: int, k2: int) -> str:
    return f"P = {learners}, Hier-AVG, K2 = {k2}"


def best_of_others(errors: NDArray[Any]) -> NDArray[np.int64]:
    """Return, for each seed, the row that has the fewest errors over the other seeds.

    Parameters
    ----------
    errors : array of shape (K, seeds).
    """
    return (errors.sum(axis=1, keepdims=True) - errors).argmin(axis=0)


def judge(results: Results) -> Finding:
    """Compare, for each P, Hier-AVG with K-AVG at the K that is best on the other seeds."""
    errors = test_errors(results)
    searched: dict[int, list[int]] = {}
    for arm in results:
        if found := re.fullmatch(r"P = (\d+), K-AVG, K = (\d+)", arm):
            searched.setdefault(int(found[1]), []).append(int(found[2]))
    comparisons, rows, lines = [], table_of({arm: 1 - errors[arm] for arm in errors}, factor=100), []
    for learners, ks in searched.items():
        of_k_avg = np.array([errors[_k_avg(learners, k)] for k in ks])
        of_hier_avg = np.array([errors[_hier_avg(learners, 2 * k)] for k in ks])
        best = best_of_others(of_k_avg)
        seeds = np.arange(len(best))
        what = f"P = {learners}: test errors of Hier-AVG with K2 = 2 K_opt, less than K-AVG with K_opt"
        comparisons.append(less(what, of_hier_avg[best, seeds], of_k_avg[best, seeds]))
        rows.append([f"P = {learners}, K_opt of each seed", ", ".join(str(ks[row]) for row in best)])
        lines.append(Line(f"P = {learners}, K-AVG", ks, 1 - of_k_avg.T))
        lines.append(Line(f"P = {learners}, Hier-AVG", [2 * k for k in ks], 1 - of_hier_avg.T))
    shown = Plot("accuracy", "steps between global means", "test accuracy", lines, is_x_log=True)
    return Finding(all_of(*comparisons), ("arm", "test accuracy, %"), rows, [shown])


def pretend(holds: bool) -> Results:
    """Return accuracies of K-AVG that are best with K = 4, and of Hier-AVG that are a little lower there, or more."""
    more = 1 + SHARE_PERCENT / 100 * (0.5 if holds else 2)
    best = 1 - 0.2 * more
    return made_up({_k_avg(16, 1): 0.7, _hier_avg(16, 2): 0.9, _k_avg(16, 4): 0.8, _hier_avg(16, 8): best})


EXPERIMENT = Experiment(
    name="hier-avg-table-1",
    paper="hier-avg",
    where="Section 4.3, Table 1",
    claim="With half as many global means (K2 = 2 K_opt), Hier-AVG matches the test accuracy of K-AVG at its best K.",
    saw="ResNet-18: with P = 16, K-AVG (K_opt = 32) has 94.00 %, Hier-AVG (K2 = 64, K1 = 2, 4, 16) 94.01, 94.11 and"
    " 94.08 %; with P = 32, K-AVG (4) 93.70 %, Hier-AVG (K2 = 8, K1 = 4, S = 8) 93.90 %; with P = 64, K-AVG (4)"
    " 92.50 %, Hier-AVG (K2 = 8, K1 = 1) 93.17 %.",
    rule="It holds if, for every P, Hier-AVG makes at most a twentieth more test errors than K-AVG; it fails if it"
    " makes more than that for one P. K_opt of a seed is the K of 1, 4 and 16 (with P = 16: of 1, 4 and 32) that has"
    " the fewest errors on the other seeds, so that no run chooses its own K. K1 and S are the best of the paper's"
    " table, and K1 at most K. A run that diverged counts as guessing.",
    scaling=SCALING + " Only the CNN is trained, and only three K are searched.",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=(
        "hier-avg/table1-p16-k-avg",
        "hier-avg/table1-p16-k2-64",
        "hier-avg/table1-p32-k-avg",
        "hier-avg/table1-p32-k2-8",
        "hier-avg/table1-p64-k-avg",
        "hier-avg/table1-p64-k2-8",
    ),
)
