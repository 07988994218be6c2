"""When a run's checkpoints are due, and which of them is the last good one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import collective
from hpcavg.config.options import Config


class CheckpointManager:
    """Writes the checkpoints of a run.

    Parameters
    ----------
    config : Config
        The run's options.
    averager : Averager
        Of this rank.
    folder : Path
        Where the checkpoints are.
    last : Path or None
        The checkpoint that the run goes on from; None for a new run.
    guard : callable
        See `collective.save`.

    Attributes
    ----------
    last : Path or None
        The last checkpoint that was written.
    step : float
        The step of the last attempt, or the first step of the run.
    failure : str or None
        Why the last attempt failed; None if it succeeded.
    remains : sequence of str
        Why older checkpoints could not be removed then.
    """

    def __init__(
        self, config: Config, averager: Averager, folder: Path, last: Path | None, guard: Callable[[], None]
    ) -> None:
        self._config = config
        self._averager = averager
        self._topology = averager.topology
        self._folder = folder
        self._guard = guard
        self.last = last
        self.step = averager.agreed_step or 0.0
        self.failure: str | None = None
        self.remains: Sequence[str] = ()
        self._written_at_s = time.monotonic()

    def is_due(self, step: float) -> bool:
        """Return whether a checkpoint is due at `step`, which all learners have reached. The same on all of them."""
        period_steps = self._config.checkpoints.checkpoint_steps
        return period_steps is not None and step // period_steps > self.step // period_steps

    @property
    def is_overdue(self) -> bool:
        """Whether a checkpoint is due by the clock. Only rank 0 asks for it, and nobody if servers keep the state."""
        minutes = self._config.checkpoints.checkpoint_minutes
        may_ask = bool(minutes) and self._topology.rank == 0 and self._averager.algorithm.server is None
        return may_ask and time.monotonic() - self._written_at_s > 60 * minutes

    def write(
        self, step: float, parts: Callable[[], Sequence[Mapping[str, Any]]], about: Callable[[], Mapping[str, Any]]
    ) -> None:
        """Write a checkpoint of all learners. Collective over them. `failure` and `remains` say how it went.

        Parameters
        ----------
        step : float
            The step that all learners have reached.
        parts : callable
            Returns the state of each learner of this rank by part. It is called again if a rank dies meanwhile.
        about : callable
            Returns, on rank 0, what the manifest says of the run. Collective, too.
        """

        def save() -> collective.Saved:
            values = {"config": self._config.as_toml(), **about()}
            keep = self._config.checkpoints.keep_checkpoints
            return collective.save(self._topology, self._folder, keep, round(step), parts(), values, self._guard)

        path, self.failure, self.remains = self._topology.run_collective(save, what="checkpoint")
        self.step, self._written_at_s = step, time.monotonic()
        if self.failure is None:
            self.last = path

    @property
    def outlook(self) -> str:
        """How to resume a run that has stopped, in a few words."""
        failed = "" if self.failure is None else f"its checkpoint could not be written ({self.failure}); "
        if self.last is None:
            return f"{failed}there is no checkpoint to go on from"
        return f"{failed}the last good one: {self.last}" if failed else f"go on with --resume {self.last}"
