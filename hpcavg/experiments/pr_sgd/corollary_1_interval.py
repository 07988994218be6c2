"""The interval of Corollary 1 costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from hpcavg.experiments.experiment import Experiment, Finding, Line, Plot, Results, Scale, table_of
from hpcavg.experiments.pr_sgd import ripples
from hpcavg.experiments.run import Run
from hpcavg.experiments.training_results import SHARE_PERCENT, less, log_slopes, more, number_in
from hpcavg.experiments.verdict import all_of, exceeds, given

# The slope of 1/sqrt(T) is -1/2.
_SLOPE = -0.45


def arms(scale: Scale) -> Mapping[str, Callable[[int], Run]]:
    """Return runs of growing length with the interval of Corollary 1, and the longest also with other intervals.

    The longest interval is the control.
    """
    learners = 4
    lengths = scale.pick((256, 1024, 4096, 16_384), (64, 256, 1024))
    settings = [(steps, ripples.largest_interval(learners, steps)) for steps in lengths]
    settings += [(lengths[-1], each) for each in scale.pick((1, 64, 512), (1, 64))]
    return ripples.runs(
        {f"N = {learners}, T = {steps}, I = {each}": (learners, steps, each) for steps, each in settings},
        problem=ripples.NOISY,
    )


def judge(results: Results) -> Finding:
    """Compare the longest run with that of I = 1, and fit the slope over the lengths."""
    found = ripples.mean_norms(results)
    by_setting = {(int(number_in(arm, "T")), int(number_in(arm, "I"))): norms for arm, norms in found.items()}
    learners = int(number_in(next(iter(results)), "N"))
    lengths = sorted({steps for steps, _ in by_setting})
    of_length = {steps: by_setting[steps, ripples.largest_interval(learners, steps)] for steps in lengths}
    norms = np.stack([*of_length.values()], axis=1)
    longest, slopes = lengths[-1], log_slopes(lengths, norms)
    of_longest = {interval: of_arm for (steps, interval), of_arm in by_setting.items() if steps == longest}
    rarest, theirs = max(of_longest), ripples.largest_interval(learners, longest)
    judgement = given(
        more(f"norm with I = {rarest}: above that with I = 1", of_longest[rarest], of_longest[1]),
        all_of(
            less(f"norm with I = {theirs}: below that with I = 1", of_longest[theirs], of_longest[1]),
            exceeds("negative slope of log norm against log T", -slopes, 0, -_SLOPE),
        ),
    )
    plot = Plot("rate", "T", "mean squared gradient norm", [Line("I = T^(1/4) / N^(3/4)", lengths, norms)], True, True)
    return Finding(judgement, ("arm", "mean squared gradient norm"), table_of(found, 4), [plot])


def _pretend(holds: bool) -> Results:
    slope = -0.5 if holds else -0.2
    lengths = {steps: ripples.largest_interval(4, steps) for steps in (256, 1024, 16_384)}
    norms = {f"N = 4, T = {steps}, I = {each}": float(steps) ** slope for steps, each in lengths.items()}
    last = 16_384.0**slope
    return ripples.made_up(norms | {"N = 4, T = 16384, I = 1": last, "N = 4, T = 16384, I = 512": 1.1 * last})


EXPERIMENT = Experiment(
    name="pr-sgd-corollary-1-interval",
    paper="pr-sgd",
    where="Corollary 1, part 2",
    claim="With means every I = T^(1/4) / N^(3/4) steps only, the rate stays O(1/sqrt(NT)): nothing is lost against I"
    " = 1.",
    saw="A theorem, with a proof and no experiment.",
    rule="It holds if the mean squared gradient norm falls with T at a slope below -0.45 (the theorem's is -1/2), and"
    f" if in the longest runs it is at most {SHARE_PERCENT:.0f} % above that of I = 1. It fails if one of these is not"
    f" so. If I = 512 does not lose more than {SHARE_PERCENT:.0f} %, rare means hardly cost here, and a claim that"
    " would hold is undecided.",
    scaling=f"{ripples.SCALING} The longest runs have 16,384 steps of 4 workers, for which I = 4; longer intervals are"
    " in the table.",
    arms=arms,
    judge=judge,
    pretend=_pretend,
)
