"""The delay costs little accuracy, compared with local SGD."""

from __future__ import annotations

from hpcavg.experiments.dasgd.networks import (
    HEADS,
    SCALING,
    SLIGHT_PERCENT,
    near_slight,
    not_many_more,
    table,
    test_errors,
)
from hpcavg.experiments.dasgd.table_1 import DELAYED, LOCAL, RECIPES, arms_of, networks, plots
from hpcavg.experiments.experiment import Experiment, Finding, Results
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of


def judge(results: Results) -> Finding:
    """Compare DaSGD with local SGD, for each network."""
    errors = test_errors(results)
    judgement = all_of(
        *(
            not_many_more(errors, f"{model}, {DELAYED}", f"{model}, {LOCAL}", SLIGHT_PERCENT)
            for model in networks(results)
        )
    )
    return Finding(judgement, HEADS, table(results), plots(results))


def pretend(holds: bool) -> Results:
    """Return accuracies that are slightly lower with the delay, or more."""
    return made_up({f"mlp, {LOCAL}": 0.7, f"mlp, {DELAYED}": near_slight(holds)})


EXPERIMENT = Experiment(
    name="dasgd-table-1-delay",
    paper="dasgd",
    where="Section 4.2, Table 1",
    claim="Compared with local SGD, the delay of DaSGD costs little accuracy.",
    saw="Table 1, tau = 4, d = 1: DaSGD is slightly below local SGD for five of eight networks, by 0.09 to 0.24 points"
    " (GoogLeNet: 94.44 against 94.68 %), and above for three, by 0.13 to 0.63.",
    rule=f"It holds if, for every network, DaSGD makes at most {SLIGHT_PERCENT:.0f} % more test errors than local SGD;"
    " it fails if it makes more than that for one network. A run that diverged counts as guessing.",
    scaling=SCALING,
    arms=lambda scale: arms_of(scale, LOCAL, DELAYED),
    judge=judge,
    pretend=pretend,
    recipes=RECIPES[2:],
)
