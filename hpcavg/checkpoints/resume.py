"""Which checkpoint a run goes on from, and whether it may."""

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

# What may differ from the run that wrote the checkpoint; whatever else a learner's state follows from must be the same.
_FREE = {
    *("steps", "epochs", "output", "resume", "engine", "wire_dtype", "error_feedback", "device", "threads"),
    *("expect_ranks", "flush_seconds", "consensus_distance", "group_size", "non_finite", "check_rounds"),
    *("checkpoint_steps", "checkpoint_minutes", "keep_checkpoints", "stop_after", "stop_margin"),
    *("on_failure", "hang_timeout", "intended_learners", "data_dir", "test_batch_size", "loader_threads", "compile"),
}


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on from; None to start afresh.

    passed_over : those that cannot be used, and why. is_any_damaged : not all of them just were never finished.
    other_length : what differs in how long the run is to be.
    """

    checkpoint: Checkpoint | None
    passed_over: Sequence[str] = ()
    is_any_damaged: bool = False
    other_length: Sequence[str] = ()

    @property
    def warnings(self) -> list[str]:
        """What the user may not know, a line each."""
        return [*(f"passed over {path}" for path in self.passed_over), *self.other_length]


def find(config: Config) -> Found:
    """Return what ``config.resume`` names, read to the last byte.

    ``auto`` is the newest whole and unharmed checkpoint of the run in ``config.output``, or none where no checkpoint
    was ever finished; a path is a run's folder, or a checkpoint in it. Raises `InputError` where there is none at the
    path, all are damaged, or it is another run's.
    """
    if config.resume is None:
        return Found(None)
    if config.resume == "auto":
        assert config.output is not None
        found = _newest(Path(config.output))
        if found.checkpoint is None and found.is_any_damaged:  # to start over would lose what may still be saved
            allowed = f"of a run with a whole checkpoint ({'; '.join(found.passed_over)}); to start over, remove them"
            raise InputError("resume", config.resume, allowed)
    elif os.path.isdir(Path(config.resume) / CHECKPOINTS):
        found = _newest(Path(config.resume))
        if found.checkpoint is None:
            why = "; ".join(found.passed_over) or "it has none"
            raise InputError("resume", config.resume, f"a run with a whole checkpoint ({why})")
    else:
        found = Found(store.open_checkpoint(config.resume))
    saved = found.checkpoint
    if saved is not None:
        saved.understand(lambda saved: _check_same(config, saved))
        found = replace(found, other_length=saved.understand(lambda saved: _other_length(config, saved)))
    return found


def check_data(config: Config, saved: Checkpoint, num_samples: int) -> None:
    """Raise `InputError` where the data are other than those of the run that wrote `saved`, as far as can be seen."""
    before = saved.manifest.about.get("num_samples", num_samples)
    if before != num_samples:
        option, value = ("task", config.task) if config.data_dir is None else ("data_dir", config.data_dir)
        allowed = f"{before} training samples, as in the run that {saved.path} is of, not {num_samples}"
        raise InputError(option, value, allowed)


def _newest(run: Path) -> Found:
    saved, passed_over = store.newest(run / CHECKPOINTS)
    is_any_damaged = any(why not in (store.NOT_FINISHED, store.NO_FOLDER) for _, why in passed_over)
    return Found(saved, [f"{path.name}: {why}" for path, why in passed_over], is_any_damaged)


def _check_same(config: Config, saved: Checkpoint) -> None:
    """Raise `InputError` for the first option that is not what it was and must be.

    Options come and go with versions. One that is new since has its default in an earlier run: that is what it did.
    """
    before, now = dict(saved.manifest.about["config"]), config.as_toml()
    defaults = {name: option.write(option.default) for name, option in OPTIONS.items()}
    for name in sorted(before.keys() - defaults.keys()):
        allowed = f"a checkpoint of a run without {name}={before[name]}, an option that this hpcavg does not have"
        raise InputError("resume", saved.path, allowed)
    for name in sorted(defaults.keys() - _FREE):
        was = before.get(name, _plain(defaults[name]))
        if was != _plain(now.get(name)):
            # One that was unset is not told from one that was not there.
            is_new = name not in before and was is not None
            whose = f"the run that {saved.path} is of"
            since = f"what {whose} did before there was this option" if is_new else f"as in {whose}"
            raise InputError(name, now.get(name, "unset"), f"{'unset' if was is None else was}, {since}")
    for name in ("steps", "epochs") if config.schedule in ("cosine", "one_cycle", "one-cycle") else ():
        if before.get(name) != now.get(name):
            allowed = f"{before.get(name)}: the {config.schedule} schedule is laid out for the run's length"
            raise InputError(name, now.get(name, "unset"), allowed)


def _other_length(config: Config, saved: Checkpoint) -> list[str]:
    """Return a line for each option that makes the run longer or shorter than it was to be."""
    before = saved.manifest.about["config"]
    return [
        f"--{name} is {getattr(config, name) or 'unset'}; in the run so far it was {before.get(name, 'unset')}"
        for name in ("steps", "epochs")
        if before.get(name) != getattr(config, name)
    ]


def _plain(value: Any) -> Any:
    """Return `value` as JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
