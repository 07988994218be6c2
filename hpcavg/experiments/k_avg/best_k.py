"""Figures 5 and 6: the best K is not always 1."""

from __future__ import annotations

from hpcavg.experiments.experiment import Experiment, Finding, Results
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.k_avg.choice_of_k import arms_with, by_k
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import any_of, exceeds

# A gain in accuracy that counts: the paper's of nin is 0.27 points.
_GAIN = 0.003


def judge(results: Results) -> Finding:
    """Compare the K that is best on the other seeds with K = 1."""
    comparisons, rows = [], []
    for (model, learners), of_k in by_k(results).items():
        first = min(of_k)
        chosen, accuracy = setting.best_on_others(of_k)
        gain = 100 * (accuracy - of_k[first]).mean()
        rows.append((model, str(learners), ", ".join(map(str, chosen)), f"{gain:.1f}"))
        what = f"accuracy of the best K less that of K = {first}, {model}, P = {learners}"
        comparisons.append(exceeds(what, accuracy, of_k[first], _GAIN))
    heads = ("network", "P", "best K on the other seeds, for each seed", f"gain over K = {first}, points")
    return Finding(any_of(*comparisons), heads, rows)


def pretend(holds: bool) -> Results:
    """Return results in which K = 4 gains with few learners twice what it must, or half as much."""
    gain = 2 * _GAIN if holds else _GAIN / 2
    accuracy = {f"mlp, P = {p}, K = {k}": 0.9 + (gain if p == 8 else -0.1) * (k > 1) for p in (8, 64) for k in (1, 4)}
    return made_up(accuracy, seeds=20)


EXPERIMENT = Experiment(
    name="k-avg-figures-5-6-best-k",
    paper="k-avg",
    where="Section 4.2, Figures 5 and 6; Theorem 3.4",
    claim="The best K is not always 1: averaging less often can train better, sample for sample.",
    saw="With vgg the best K is never 1; it is between 2 (P = 64) and 32 (P = 8). With nin it is 1, but for P = 8.",
    rule="For each seed, the best K is that of the highest mean accuracy on the other seeds. It holds if, for some"
    f" network and P, the best K is more than {_GAIN * 100:.1f} points of test accuracy above K = 1. It fails if for"
    " none of them it is.",
    scaling=f"{setting.SCALING} {setting.LEFT_OUT}",
    arms=lambda scale: arms_with(scale, *setting.MODELS),
    judge=judge,
    pretend=pretend,
    recipes=("k-avg/figure5", "k-avg/figure6"),
)
