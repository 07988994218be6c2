"""Section 4.3: compared with sequential SGD, K-AVG speeds epochs up almost linearly."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from hpcavg.experiments.experiment import Experiment, Finding, Results
from hpcavg.experiments.k_avg import setting, speed_ups
from hpcavg.experiments.verdict import all_of, exceeds

# The part of a linear speed-up that is almost linear.
_ALMOST = 0.8


def judge(results: Results) -> Finding:
    """Judge the speed-ups with the most learners."""
    comparisons, rows = [], []
    parts: dict[str, dict[int, NDArray[Any]]] = {}
    for model, arm in speed_ups.of_the_verdict(results).items():
        learners = results.values_of(arm, "learners")[0]
        part = results.values_of(arm, "sgd_s") / results.values_of(arm, "k_avg_s") / learners
        comparisons.append(exceeds(f"speed-up over P, {model}, P = {learners[-1]:.0f}", part[:, -1], 0, _ALMOST))
        parts[model] = {int(number): of_seed for number, of_seed in zip(learners, part.T, strict=True)}
        rows += [
            (model, str(number), f"{(number * of_seed).mean():.1f}", f"{of_seed.mean():.2f}")
            for number, of_seed in parts[model].items()
        ]
    plot = setting.plot_of("speed-up", "learners", parts, "speed-up over learners")
    return Finding(all_of(*comparisons), ("network", "P", "speed-up", "over P"), rows, [plot])


EXPERIMENT = Experiment(
    name="k-avg-section-4.3",
    paper="k-avg",
    where="Section 4.3",
    claim="Compared with sequential SGD, K-AVG speeds epochs up almost linearly in the number of learners. Here this is"
    " a claim about a model of costs.",
    saw="K-AVG achieves almost linear speed-up in terms of epoch processing time; the paper gives no numbers.",
    rule=f"It holds if, with both networks and P = 128, the speed-up of the simulated time is more than {_ALMOST} P,"
    " and fails if one is less.",
    scaling=speed_ups.ASSUMED,
    arms=lambda scale: speed_ups.arms_with(scale, *setting.MODELS),
    judge=judge,
    pretend=speed_ups.pretend,
)
