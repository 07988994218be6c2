"""When a run stops early, and what happens when a rank dies or hangs."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, number, option

_seconds = number(lambda seconds: seconds >= 0, "a number of at least 0")


@dataclass(frozen=True)
class FaultOptions(Section):
    """When the run stops early, and what happens when a rank dies or hangs."""

    title = "checkpoints and faults"

    stop_after: float | None = option(
        None,
        "seconds after which to write a checkpoint and stop",
        number(lambda seconds: seconds > 0, "a positive number of seconds"),
    )
    stop_margin: float = option(120.0, "seconds to do so before the end of a Slurm job", _seconds)
    on_failure: str = option(
        "abort",
        "when a rank dies or hangs: abort the job; restart: the same, with the exit status that asks for it; shrink: go"
        " on with the others (mpirun --with-ft ulfm)",
        choices=("abort", "restart", "shrink"),
    )
    hang_timeout: float = option(600.0, "seconds to wait for ranks in a mean before they hang; 0: for ever", _seconds)
