"""When checkpoints are written, and from which one a run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, integer, number, option


@dataclass(frozen=True)
class CheckpointOptions(Section):
    """When checkpoints are written, how many are kept, and from which one the run goes on."""

    title = "checkpoints and faults"

    resume: str | None = option(
        None, "a run's folder, or a checkpoint, to go on from; auto: the newest good one in --output, if any"
    )
    checkpoint_steps: int | None = option(None, "steps between checkpoints", integer(1))
    checkpoint_minutes: float = option(
        30.0,
        "minutes between checkpoints; 0: none by the clock",
        number(lambda minutes: minutes >= 0, "a number of at least 0"),
    )
    keep_checkpoints: int = option(2, "checkpoints to keep, of the newest", integer(1))
