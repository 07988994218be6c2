"""Figures 3 and 4: with many learners K-AVG is faster than algorithms with a parameter server."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Results, Scale
from hpcavg.experiments.k_avg import setting
from hpcavg.experiments.run import Run
from hpcavg.experiments.verdict import all_of, exceeds

# Speed-ups with the fewest learners, at most, and with the most, at least.
_NONE, _CLEAR = 1.0, 2.0
# Of assumed networks, in Gbit/s, and of the one that the verdict is about.
_GBIT, _ASSUMED_GBIT = (1, 10, 100), 10
_LATENCY_S = 20e-6
ASSUMED = (
    "These are times of a model, not of a machine. Measured, in the run, on one core: a training step of one learner"
    f" with a batch of 16, and a sum of two models. Assumed: a network of {_ASSUMED_GBIT} Gbit/s in each direction, and"
    f" {1e6 * _LATENCY_S:.0f} us; one server that answers learners one after the other; a mean by recursive halving;"
    f" steps that vary as exp({setting.SPREAD} z) with a normal z. The networks are smaller than the paper's by a"
    " factor of 40 and more, and so are their steps: the verdict is about these costs."
)
"""What of the simulated times is measured, and what is assumed."""


def arms_with(scale: Scale, *models: str) -> Mapping[str, Callable[[int], Run]]:
    """Return the simulations of models, with each of the networks that may join learners."""
    return {f"{model}, {gbit} Gbit/s": partial(_simulation, scale, model, gbit) for model in models for gbit in _GBIT}


def of_the_verdict(results: Results) -> dict[str, str]:
    """Return, by model, the arm of the network that the verdict is about."""
    arms = (arm.split(", ") for arm in results)
    return {model: f"{model}, {gbit}" for model, gbit in arms if gbit == f"{_ASSUMED_GBIT} Gbit/s"}


def _simulation(scale: Scale, model: str, gbit: float, seed: int) -> Run:
    options = {
        "learners": [8, 16, 32, 64, 128],
        "k": setting.K,
        "rounds": scale.pick(100, 20),
        "bytes_per_s": gbit * 1e9 / 8,
        "latency_s": _LATENCY_S,
        "spread": setting.SPREAD,
        "task": "mnist1d",
        "model": model,
        "num_samples": 1_000,
        "batch_size": 16,
        "seed": seed,
    }
    return Run("costs:simulate", options, work=scale.pick(2.0, 1.0))


def experiment(figure: int, model: str, saw: str) -> Experiment:
    """Return the experiment of a figure.

    Parameters
    ----------
    figure : its number.
    model : the network of these runs.
    saw : what the paper saw.
    """
    return Experiment(
        name=f"k-avg-figure-{figure}",
        paper="k-avg",
        where=f"Section 4.1, Figure {figure}",
        claim="With few learners K-AVG takes a little longer than Downpour and EAMSGD for the same number of samples;"
        " with many it is much faster. Here this is a claim about a model of costs.",
        saw=saw,
        rule="A speed-up is the simulated time of the other over that of K-AVG. It holds if, with a network of"
        f" {_ASSUMED_GBIT} Gbit/s, both are below {_NONE:.0f} with 8 learners and above {_CLEAR:.0f} with 128. It fails"
        " if one of these is not so.",
        scaling=ASSUMED,
        arms=lambda scale: arms_with(scale, model),
        judge=judge,
        pretend=pretend,
        recipes=tuple(f"k-avg/figure{figure - 2}-{name}" for name in ("k-avg", "downpour", "eamsgd")),
    )


def judge(results: Results) -> Finding:
    """Judge the speed-ups over both, with the fewest learners and with the most."""
    ((model, ours),) = of_the_verdict(results).items()
    learners = [int(number) for number in results.values_of(ours, "learners")[0]]
    comparisons, speed_ups = [], {}
    for arm in results:
        gbit = arm.removeprefix(f"{model}, ")
        for name in ("Downpour", "EAMSGD"):
            speed_up = results.values_of(arm, f"{name.lower()}_s") / results.values_of(arm, "k_avg_s")
            speed_ups[f"{name}, {gbit}"] = dict(zip(learners, speed_up.T, strict=True))
            if arm == ours:
                few = f"{_NONE} less the speed-up over {name}, P = {learners[0]}"
                comparisons.append(exceeds(few, _NONE, speed_up[:, 0]))
                comparisons.append(exceeds(f"speed-up over {name}, P = {learners[-1]}", speed_up[:, -1], 0, _CLEAR))
    rows = [
        (f"speed-up over {name}, P = {number}", f"{of_seed.mean():.2f} ± {of_seed.std(ddof=1):.2f}")
        for name, by_learners in speed_ups.items()
        for number, of_seed in by_learners.items()
    ]
    for what, name, factor in (
        ("a step, us", "step_s", 1e6),
        ("a sum, us", "sum_s", 1e6),
        ("a model, KB", "num_bytes", 1e-3),
    ):
        values = factor * results.values_of(ours, name)
        rows.append((what, f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"))
    plot = setting.plot_of("speed-up", "learners", speed_ups, "speed-up of K-AVG")
    return Finding(all_of(*comparisons), ("what", "value"), rows, [plot])


def pretend(holds: bool) -> Results:
    """Return results in which servers are slow with many learners, or never."""
    slow = 2.2 if holds else 1.8
    noise = 1e-3 * np.random.default_rng(0).normal(size=5)
    runs = [
        {
            "learners": [8, 128],
            "k_avg_s": [1.0, 1.0 + each],
            "downpour_s": [0.95 + each, slow],
            "eamsgd_s": [0.95 + each, slow],
            "sgd_s": [7.5, 115.0 if holds else 60.0],
            "step_s": 1e-3,
            "sum_s": 1e-5,
            "num_bytes": 92_000,
        }
        for each in noise.tolist()
    ]
    return Results({f"mlp, {_ASSUMED_GBIT} Gbit/s": runs})


FIGURE_3 = experiment(
    3,
    "mlp",
    "With vgg and P = 8 the others are slightly faster. The speed-up grows with P. With P = 128 it is around 2.5 over"
    " Downpour and 2.6 over EAMSGD.",
)
FIGURE_4 = experiment(
    4, "cnn1d", "With nin it is similar to vgg, where the speed-ups at P = 128 are around 2.5 and 2.6."
)
