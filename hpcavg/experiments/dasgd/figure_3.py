"""Mini-batch SGD ends with less training loss, and local SGD and DaSGD with less test loss."""

from __future__ import annotations

from hpcavg.experiments.dasgd.networks import HEADS, SCALING, final, table
from hpcavg.experiments.dasgd.table_1 import DELAYED, LARGE, LOCAL, RECIPES, arms_of, networks, plots
from hpcavg.experiments.experiment import Experiment, Finding, Results
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds


def judge(results: Results) -> Finding:
    """Compare the final losses with those of mini-batch SGD, for each network."""
    trains, tests = final(results, "train_loss"), final(results, "test_loss")
    comparisons = []
    for model in networks(results):
        large = f"{model}, {LARGE}"
        for arm in (f"{model}, {LOCAL}", f"{model}, {DELAYED}"):
            comparisons.append(exceeds(f"{arm}: training loss above mini-batch SGD", trains[arm], trains[large]))
            comparisons.append(exceeds(f"{arm}: test loss below mini-batch SGD", tests[large], tests[arm]))
    shown = [*plots(results, "train_loss"), *plots(results, "test_loss")]
    return Finding(all_of(*comparisons), HEADS, table(results), shown)


def pretend(holds: bool) -> Results:
    """Return losses as the paper saw them, or with the test losses the other way round."""
    arms = {f"mlp, {LARGE}": (0.2, 0.6), f"mlp, {LOCAL}": (0.3, 0.5), f"mlp, {DELAYED}": (0.3, 0.5 if holds else 0.7)}
    results = made_up(dict.fromkeys(arms, 0.8), {arm: train for arm, (train, _) in arms.items()})
    return Results(
        {
            arm: [
                {**run, "summary": {**run["summary"], "test_loss": arms[arm][1] + 1e-3 * seed}}
                for seed, run in enumerate(runs)
            ]
            for arm, runs in results.items()
        }
    )


EXPERIMENT = Experiment(
    name="dasgd-figure-3",
    paper="dasgd",
    where="Section 4.2, Figure 3",
    claim="Mini-batch SGD ends with less training loss; local SGD and DaSGD end with less test loss.",
    saw="Figure 3, with the runs of Table 1: at the end the training loss of mini-batch SGD is smaller, but local SGD"
    " and DaSGD have smaller test losses and higher accuracies. The text gives no numbers.",
    rule="It holds if, for every network, both local SGD and DaSGD have more training loss (of the last epoch) and less"
    " test loss than mini-batch SGD; it fails if one of these is the other way round. A run that diverged has the loss"
    " of guessing.",
    scaling=SCALING,
    arms=lambda scale: arms_of(scale, LARGE, LOCAL, DELAYED),
    judge=judge,
    pretend=pretend,
    recipes=RECIPES[1:],
)
