"""Finds the checkpoint that a run resumes from, and checks that it is of the same run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hpcavg.checkpoints import store
from hpcavg.checkpoints.store import Checkpoint
from hpcavg.config.options import CHECKPOINTS, OPTIONS, Config
from hpcavg.errors import InputError
from hpcavg.utils.format_version import NEWER

# Options that may differ from the run that wrote the checkpoint. A learner's state depends on all others.
_FREE = {
    *("steps", "epochs", "output", "resume", "engine", "wire_dtype", "error_feedback", "crossing", "device", "threads"),
    *("expect_ranks", "flush_seconds", "consensus_distance", "group_size", "non_finite", "check_rounds"),
    *("learners_per_rank", "learners"),
    *("checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "stop_after", "stop_margin"),
    *("on_failure", "hang_timeout", "intended_learners", "data_dir", "test_batch_size", "loader_threads", "compile"),
}


@dataclass(frozen=True)
class ResumePoint:
    """Where a run goes on from.

    Parameters
    ----------
    checkpoint : Checkpoint or None
        None for a run that starts from the beginning.
    passed_over : sequence of str
        Newer checkpoints that cannot be used, each with the reason.
    is_any_damaged : bool
        Whether any of these is damaged, and not just unfinished.
    other_length : sequence of str
        How the run's length differs from what it was.
    """

    checkpoint: Checkpoint | None
    passed_over: Sequence[str] = ()
    is_any_damaged: bool = False
    other_length: Sequence[str] = ()

    @property
    def warnings(self) -> list[str]:
        """Lines to show to the user."""
        return [*(f"passed over {path}" for path in self.passed_over), *self.other_length]


def find(config: Config) -> ResumePoint:
    """Return the checkpoint that ``--resume`` names, after reading every byte of it.

    ``auto`` is the newest good checkpoint of the run in ``--output``, or none if no checkpoint was ever finished.
    A path is a run's folder, or a checkpoint in it.

    Raises
    ------
    InputError
        If there is no checkpoint at the path, if all are damaged, or if it is another run's.
    """
    if config.checkpoints.resume is None:
        return ResumePoint(None)
    if config.checkpoints.resume == "auto":
        assert config.run.output is not None
        found = _newest(Path(config.run.output))
        if found.checkpoint is None and found.is_any_damaged:  # starting over would lose what may still be rescued
            allowed = f"of a run with a whole checkpoint ({'; '.join(found.passed_over)}); to start over, remove them"
            raise InputError("resume", config.checkpoints.resume, allowed)
    elif os.path.isdir(Path(config.checkpoints.resume) / CHECKPOINTS):
        found = _newest(Path(config.checkpoints.resume))
        if found.checkpoint is None:
            why = "; ".join(found.passed_over) or "it has none"
            raise InputError("resume", config.checkpoints.resume, f"a run with a whole checkpoint ({why})")
    else:
        found = ResumePoint(store.open_checkpoint(config.checkpoints.resume))
    saved = found.checkpoint
    if saved is not None:
        saved.understand(lambda saved: _check_same(config, saved))
        found = replace(found, other_length=saved.understand(lambda saved: _other_length(config, saved)))
    return found


def check_data(config: Config, saved: Checkpoint, num_samples: int) -> None:
    """Raise `InputError` if the number of training samples is not that of the run that wrote `saved`."""
    before = saved.manifest.about.get("num_samples", num_samples)
    if before != num_samples:
        problem = config.problem
        option, value = ("task", problem.task) if problem.data_dir is None else ("data_dir", problem.data_dir)
        allowed = f"{before} training samples, as in the run that {saved.path} is of, not {num_samples}"
        raise InputError(option, value, allowed)


def _newest(run: Path) -> ResumePoint:
    saved, passed_over = store.newest(run / CHECKPOINTS)
    is_any_damaged = any(why not in (store.NOT_FINISHED, store.NO_FOLDER) for _, why in passed_over)
    return ResumePoint(saved, [f"{path.name}: {why}" for path, why in passed_over], is_any_damaged)


def _check_same(config: Config, saved: Checkpoint) -> None:
    """Raise `InputError` for the first option that has changed and must not.

    An option that is absent from the checkpoint came later: the run did what the option's default does.
    """
    before, now = dict(saved.manifest.about["config"]), config.as_toml()
    defaults = {name: option.write(option.default) for name, option in OPTIONS.items()}
    for name in sorted(before.keys() - defaults.keys()):
        allowed = f"a checkpoint of options that this hpcavg has; {name}={before[name]} is unknown: {NEWER}"
        raise InputError("resume", saved.path, allowed)
    for name in sorted(defaults.keys() - _FREE):
        was = before.get(name, _plain(defaults[name]))
        if was != _plain(now.get(name)):
            # The checkpoint does not distinguish an unset option from one that did not exist.
            is_new = name not in before and was is not None
            whose = f"the run that {saved.path} is of"
            since = f"what {whose} did before there was this option" if is_new else f"as in {whose}"
            raise InputError(name, now.get(name, "unset"), f"{'unset' if was is None else was}, {since}")
    schedule = config.optimization.schedule
    for name in ("steps", "epochs") if schedule in ("cosine", "one-cycle") else ():
        if before.get(name) != now.get(name):
            allowed = f"{before.get(name)}: the {schedule} schedule is laid out for the run's length"
            raise InputError(name, now.get(name, "unset"), allowed)


def _other_length(config: Config, saved: Checkpoint) -> list[str]:
    """Return a line for each option that makes the run longer or shorter than it was to be."""
    before = saved.manifest.about["config"]
    return [
        f"--{name} is {getattr(config.run, name) or 'unset'}; in the run so far it was {before.get(name, 'unset')}"
        for name in ("steps", "epochs")
        if before.get(name) != getattr(config.run, name)
    ]


def _plain(value: Any) -> Any:
    """Return `value` as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
