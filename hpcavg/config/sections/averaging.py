"""What an averager is asked for besides its rule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from hpcavg.config.components import ENGINES
from hpcavg.config.section import Section, argument, integer, option
from hpcavg.errors import InputError

WIRE_DTYPES = ("bfloat16", "float16")


def _check_wire_dtype(name: str, value: str) -> None:
    if value not in WIRE_DTYPES:
        raise InputError(name, value, f"one of {', '.join(WIRE_DTYPES)}")


class StepTimes(NamedTuple):
    """Durations of the steps of simulated learners.

    Attributes
    ----------
    kind : ``"constant"``, ``"lognormal"`` or ``"slow"``.
    number : the SIGMA of ``lognormal`` or the FACTOR of ``slow``.
    """

    kind: str
    number: float = math.nan


def read_step_times(name: str, value: str) -> StepTimes:
    """Return the durations that `value`, of the option `name`, describes.

    Raises
    ------
    InputError
        If it describes none.

    Examples
    --------
    >>> from hpcavg.config.sections.averaging import read_step_times
    >>> read_step_times("step_times", "slow:4")
    StepTimes(kind='slow', number=4.0)
    """
    kind, _, text = str(value).partition(":")
    if value == "constant":
        return StepTimes(kind)
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    lowest = {"lognormal": math.ulp(0.0), "slow": 1.0}.get(kind, math.inf)
    if not lowest <= number < math.inf:
        raise InputError(name, value, "constant, lognormal:SIGMA with SIGMA > 0, or slow:FACTOR with FACTOR >= 1")
    return StepTimes(kind, number)


def _check_step_times(name: str, value: str) -> None:
    read_step_times(name, value)


@dataclass(frozen=True)
class AveragingOptions(Section):
    """The options of `hpcavg.Averager`, the same on all ranks.

    Parameters
    ----------
    buffers : what happens to floating-point buffers (BatchNorm statistics): ``"average"`` them with the parameters,
        ``"keep"`` each learner's own to the end, or ``"recompute"`` them on the averaged model, for which
        `Averager.finish` needs batches.
    optimizer_state : at a global mean ``"keep"`` each learner's state, ``"average"`` it, or ``"reset"`` it.
    engine : how means are taken: ``"auto"``, or a name that ``python -m hpcavg --engine help`` lists.
    wire_dtype : ``"bfloat16"`` or ``"float16"``: nodes send differences from the last mean in this type. Needs the
        engine ``"twolevel"`` or ``"auto"``. The final mean and `Averager.mean_model` are exact. None: no rounding.
    error_feedback : add what `wire_dtype` rounds away to the next difference.
    crossing : the way of parameters between nodes. None: a trial finds the fastest, and a checkpoint keeps it. With
        more than two nodes the last bits of a mean depend on it: two runs that shall be equal need the same one. The
        forms are ``"allreduce:LANES"``, ``"allreduce:LANES:KIB"`` and ``"chunks:LANES:KIB"``: the ranks of a node that
        communicate, and the size of pieces.
    non_finite : what happens to a learner whose parameters are not finite: ``"exclude"`` it from the mean and give it
        the mean of the others, or ``"stop"`` with `SickLearnersError`. If all learners are sick, the run stops.
    check_rounds : after so many global means, and after the final one, compare what must be equal on all learners.
        `CorruptionError` reports a difference. 0 compares nothing.
    measure_distance : measure the consensus distance on all parameters, for the price of a copy of them. Otherwise it
        is measured on a sample of large arrays, one element of 128.
    step_times : durations of the learners' steps where servers are simulated; see docs/library.md. ``"constant"``: 1.
        ``"lognormal:SIGMA"``: each is drawn, exp(SIGMA z) over its mean with a normal z. ``"slow:FACTOR"``: 1, but
        FACTOR for the last learner.
    seed : seeds `Averager.generator`, this learner's own stream of random numbers. It may differ between ranks.
    total_steps : steps of every learner, for `Averager.done` and for rules that follow them.
    batch_size : samples per step of every learner, for rules that follow it.
    start : every learner starts from ``"rank0"``'s parameters and buffers, or from its ``"own"``, for a model that was
        restored before the averager is made.
    hang_timeout : seconds after which a rank that others wait for is reported and the job is ended; 0 waits for ever.
        None takes the environment's ``HPCAVG_HANG_TIMEOUT``, else 600. The first averager of a topology decides.

    Raises
    ------
    InputError
        If a value cannot be used.

    Examples
    --------
    >>> from hpcavg.config.sections.averaging import AveragingOptions
    >>> AveragingOptions(buffers="keep").non_finite
    'exclude'
    """

    title = "averaging"

    buffers: str = option("average", "BatchNorm statistics at a mean", choices=("average", "keep", "recompute"))
    optimizer_state: str = option("keep", "momentum at a global mean", choices=("keep", "average", "reset"))
    engine: str = option("auto", "how means are taken", choices=tuple(ENGINES))
    wire_dtype: str | None = option(
        None,
        "bfloat16 or float16: what differences from the last mean cross nodes as; unset: they cross as they are",
        _check_wire_dtype,
    )
    error_feedback: bool = option(False, "add what --wire-dtype rounds away to the next difference")
    crossing: str | None = option(
        None, "way between nodes, such as allreduce:2:2048 or chunks:1:60; unset: the fastest of a trial"
    )
    non_finite: str = option(
        "exclude",
        "learners with non-finite parameters: exclude them from the mean and give it to them, or stop the run",
        choices=("exclude", "stop"),
    )
    check_rounds: int = option(
        0, "compare what learners must hold alike after every so many global means; 0: never", integer(0)
    )
    measure_distance: bool = option(
        False,
        "measure how far learners are apart on all parameters, not on one of 128, for the price of a copy",
        name="consensus_distance",
    )
    step_times: str = option(
        "constant",
        "durations of steps where servers are simulated: constant, lognormal:SIGMA, or slow:FACTOR for one learner",
        _check_step_times,
    )
    seed: int = argument(0, compare=False)
    total_steps: int | None = argument(None, integer(1))
    batch_size: int | None = argument(None, integer(1))
    start: str = argument("rank0", choices=("rank0", "own"))
    hang_timeout: float | None = argument(None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(
            "error_feedback", self.wire_dtype is not None or not self.error_feedback, "false without wire_dtype"
        )
