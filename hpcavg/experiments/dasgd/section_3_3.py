"""A mean is hidden if the steps until its merge take longer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale
from hpcavg.experiments.run import Run
from hpcavg.experiments.verdict import all_of, within

_TAU = 8
# Away from the numbers of steps of the delays, where the share has its kink and the noise of times counts.
_MEAN_STEPS = 3.0
_MARGIN = 0.1


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs with several delays, whose means take 3 steps."""
    rounds = scale.pick(25, 6)
    options = {"rounds": rounds, "mean_steps": _MEAN_STEPS, "model": "cnn1d", "batch_size": scale.pick(512, 256)}

    def run_of(delay: int) -> Callable[[int], Run]:
        return lambda seed: Run(
            "overlap:overlap", {**options, "tau": _TAU, "delay": delay, "seed": seed}, work=0.1 * rounds
        )

    return {f"d = {delay}": run_of(delay) for delay in scale.pick((1, 2, 4, 6), (1, 4))}


def values_of(results: Results, arm: str) -> dict[str, NDArray[Any]]:
    """Return shares and speeds, by the model and measured: one for each seed, the median of its rounds.

    Parameters
    ----------
    results : of these runs.
    arm : one of them, which names its delay.
    """
    step_s, mean_s, blocked_s, round_s = (
        results.values_of(arm, name) for name in ("step_s", "mean_s", "blocked_s", "round_s")
    )
    share = np.minimum(1, _delay(arm) * step_s / mean_s)
    without_s = _TAU * step_s
    of_rounds = {
        "share": share,
        "measured share": 1 - blocked_s / mean_s,
        "speed": without_s / (without_s + (1 - share) * mean_s),
        "measured speed": without_s / round_s,
    }
    return {name: np.median(values, axis=1) for name, values in of_rounds.items()}


def _delay(arm: str) -> float:
    return float(arm.rpartition(" ")[2])


def judge(results: Results) -> Finding:
    """Compare hidden shares and speeds with the model, for each delay."""
    by_arm = {arm: values_of(results, arm) for arm in results}
    judgement = all_of(
        *(
            comparison
            for arm, values in by_arm.items()
            for name in ("share", "speed")
            for comparison in within(f"{arm}: measured {name}", values[f"measured {name}"], values[name], _MARGIN)
        )
    )
    rows = [
        (arm, *(f"{of_seed.mean():.2f} ± {of_seed.std(ddof=1):.2f}" for of_seed in values.values()))
        for arm, values in by_arm.items()
    ]
    lines = [
        Line(label, [_delay(arm) for arm in results], np.stack([values[name] for values in by_arm.values()], axis=1))
        for label, name in (("model", "share"), ("measured", "measured share"))
    ]
    heads = ("delay", "hidden, by the model", "hidden, measured", "speed, by the model", "speed, measured")
    return Finding(judgement, heads, rows, [Plot("hidden", "delay", "hidden share of a mean", lines)])


def pretend(holds: bool) -> Results:
    """Return times of steps of 1 s and means of 3 s that are hidden as in the model, or not at all."""
    noise = 1e-3 * np.random.default_rng(0).normal(size=5)

    def result(delay: int, shift: float) -> dict[str, list[float]]:
        blocked_s = 3.0 - (min(delay, 3) if holds else 0) + shift
        return {"step_s": [1.0], "mean_s": [3.0], "blocked_s": [blocked_s], "round_s": [_TAU + blocked_s]}

    return Results({f"d = {delay}": [result(delay, shift) for shift in noise.tolist()] for delay in (1, 4)})


EXPERIMENT = Experiment(
    name="dasgd-section-3.3",
    paper="dasgd",
    where="Section 3.3",
    claim="A mean that takes t_c is hidden by the d steps of t_p until its merge: a share of min(1, d t_p / t_c), hence"
    " all of it if t_c < d t_p.",
    saw="Section 3.3 derives d > t_c / t_p, and says that d = 1 hides the mean in most cases. It is a model: the paper"
    " measures no times.",
    rule="Measured are, for each d, the share of a mean's time for which the averager did not keep the learner waiting,"
    " and the speed: the time of tau steps without a mean over that of a round with one. The model says"
    " min(1, d t_p / t_c), and tau t_p / (tau t_p + the rest of t_c). It holds if no measured share or speed differs"
    f" from the model by more than {_MARGIN}, and fails if one does.",
    scaling="One rank trains a small CNN with batches of 512. Its mean needs no wire: it also waits until a time of 3"
    " steps is over, as if others were slow to answer, so t_c is set and not measured on a network. t_p is that of"
    " steps without a mean in flight, in the same round; shares and speeds are medians over the rounds.",
    arms=arms,
    judge=judge,
    pretend=pretend,
)
