"""With many learners K-AVG trains at a rate at which algorithms with a parameter server do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import made_up
from hpcavg.experiments.verdict import all_of, exceeds

# An accuracy above it shows that a run has learned.
_LEARNED = 2 * setting.CHANCE


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with the most learners, at the rate of the other figures and at a tenth of it."""
    _, most = setting.few_and_most(scale)
    found = {}
    for model in setting.MODELS:
        found[f"K-AVG, {model}"] = setting.run_of(scale, model, most, **setting.k_avg())
        for name, algorithm in setting.servers().items():
            found[f"{name}, {model}"] = setting.run_of(scale, model, most, **algorithm)
            found[f"{name}, {model}{setting.TENTH}"] = setting.run_of(
                scale, model, most, setting.SMALL_RATES, **algorithm
            )
    return found


def judge(results: Results) -> Finding:
    """Ask of each arm whether it learned, as K-AVG must, and Downpour at a tenth of the rate; the others must not."""
    accuracy = setting.accuracies(results)
    comparisons = []
    for arm, of_arm in accuracy.items():
        must_learn = arm.startswith("K-AVG") or (arm.startswith("Downpour") and arm.endswith(setting.TENTH))
        if must_learn:
            comparisons.append(exceeds(f"accuracy of {arm}", of_arm, 0, _LEARNED))
        else:
            comparisons.append(exceeds(f"{_LEARNED} less the accuracy of {arm}", _LEARNED, of_arm))
    return Finding(all_of(*comparisons), setting.HEADS, setting.table(results))


def pretend(holds: bool) -> Results:
    """Return results half-way between chance and what counts as learned, or above it by as much."""
    low = setting.CHANCE + (0.5 if holds else 1.5) * (_LEARNED - setting.CHANCE)
    by_model = {
        "K-AVG, {}": 0.9,
        "Downpour, {}": low,
        f"Downpour, {{}}{setting.TENTH}": 0.4,
        "EAMSGD, {}": low,
        f"EAMSGD, {{}}{setting.TENTH}": low,
    }
    return made_up({arm.format(model): accuracy for model in setting.MODELS for arm, accuracy in by_model.items()})


EXPERIMENT = Experiment(
    name="k-avg-section-4.1",
    paper="k-avg",
    where="Section 4.1",
    claim="With many learners K-AVG trains at a rate that is too high for Downpour and EAMSGD; at a tenth of it"
    " Downpour trains, too, and EAMSGD still does not.",
    saw="At P = 128 and the rate 1, Downpour and EAMSGD do not converge (around 10 %). At the rate 0.1 Downpour reaches"
    " around 80 % with vgg and 87 % with nin; EAMSGD still does not converge.",
    rule=f"A run has learned if its test accuracy is above {100 * _LEARNED:.0f} %, twice chance. It holds if, with both"
    " networks and on average, K-AVG and Downpour at a tenth of the rate have learned, and Downpour at the full rate"
    " and EAMSGD at both rates have not. It fails if one of these is not so.",
    scaling=f"{setting.SCALING} {setting.SIMULATED}",
    arms=arms,
    judge=judge,
    pretend=pretend,
    recipes=("k-avg/figure1-downpour", "k-avg/figure1-eamsgd", "k-avg/figure2-downpour", "k-avg/figure2-eamsgd"),
)
