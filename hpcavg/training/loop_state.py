"""The state of a learner's training loop: what a checkpoint holds of it, and how it goes on from one.

Each part is saved and loaded by two functions that stand side by side here. New content of checkpoints takes an entry
in `_LOOP`, or a pair of functions, and the code that owns the content. The names inside checkpoints stay for ever: runs
of all earlier versions are resumed by them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from hpcavg.algorithms.schedule import Progress
from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import random_state, resume
from hpcavg.checkpoints.form import check_form, load_fitting
from hpcavg.checkpoints.store import Checkpoint
from hpcavg.config.options import Config
from hpcavg.results.view import Positions
from hpcavg.training.forward_backward import ForwardBackward
from hpcavg.training.loader import BatchLoader
from hpcavg.training.run_totals import RunTotals
from hpcavg.utils.format_version import refuse_unknown


@dataclass
class LoopState:
    """What a learner trains with, and how far it has come.

    Parameters
    ----------
    config : Config
        The run's options.
    device : torch.device
        Where the model is.
    averager : Averager
        Holds the model and the optimizer, too.
    passes : ForwardBackward
        Forward and backward passes.
    loader : BatchLoader
        The mini-batches.
    scheduler : LRScheduler or None
        Of the learning rate; None if it is constant.
    total_steps : int
        Steps of the whole run.

    Attributes
    ----------
    totals : RunTotals
        What this rank did so far.
    epoch : int
        Epochs that are over.
    losses : list of Tensor
        Training losses since then, on the device.
    segments : sequence of Positions
        History of the metrics; see `view.continued`.
    """

    config: Config
    device: torch.device
    averager: Averager
    passes: ForwardBackward
    loader: BatchLoader
    scheduler: LRScheduler | None
    total_steps: int
    totals: RunTotals = field(default_factory=RunTotals)
    epoch: int = 0
    losses: list[Tensor] = field(default_factory=list)
    segments: Sequence[Positions] = ()
    _started_s: float | None = None

    def start_clock(self) -> None:
        """Count the wall time from now on."""
        self._started_s = time.monotonic()

    def stop_clock(self) -> None:
        """Keep the wall time in the totals."""
        self.totals.wall_s, self._started_s = self.wall_s, None

    @property
    def wall_s(self) -> float:
        """Seconds of training so far, those of earlier segments included."""
        return self.totals.wall_s + (0.0 if self._started_s is None else time.monotonic() - self._started_s)

    def follow_schedule(self, step: float) -> None:
        """Set the learning rate to that of `step`."""
        if self.scheduler is not None:
            while self.scheduler.last_epoch < min(int(step), self.total_steps):
                self.scheduler.step()

    # -- saving and loading ---------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Any]:
        """Return the learner's state, by the parts of a rank's file."""
        return {name: value for part in _PARTS for name, value in part.save(self).items()}

    def about(self, positions: Positions) -> dict[str, Any]:
        """Return what the manifest says of the run; `positions` are those of all ranks' metrics."""
        return {
            "steps_per_epoch": self.loader.steps_per_epoch,
            "num_samples": len(self.loader.data.train_inputs),
            "metrics": {"resumed": self.segments, "positions": positions},
        }

    def is_of_as_many(self, saved: Checkpoint) -> bool:
        """Return whether as many learners wrote the checkpoint as there are now."""
        return saved.manifest.num_ranks == self.averager.topology.num_learner_ranks

    def go_on_from(self, saved: Checkpoint) -> None:
        """Restore this learner from `saved`; if other numbers of learners wrote it, go on from their mean model."""
        resume.check_data(self.config, saved, len(self.loader.data.train_inputs))
        if self.is_of_as_many(saved):
            self._restore(saved.load(self.averager.topology.rank))
        else:
            self._start_from_mean(saved)

    def _restore(self, parts: Mapping[str, Any]) -> None:
        refuse_unknown(parts, [name for part in _PARTS for name in part.names])
        for part in _PARTS:
            part.load(self, parts)

    def _start_from_mean(self, saved: Checkpoint) -> None:
        """Go on from the mean model, which the model already holds: with everything new but progress and epochs."""
        before, now = saved.manifest.about["steps_per_epoch"], self.loader.steps_per_epoch
        step = saved.manifest.step
        loop = saved.load(self.averager.topology.rank % saved.manifest.num_ranks, ["loop"])["loop"]
        is_evaluated = step < (loop["epoch"] + 1) * before
        if (
            self.config.run.steps is None
        ):  # the run's length is counted in epochs, which have other numbers of steps now
            step = round(step * now / before)
        step = min(step, self.total_steps)
        self._restart_averager(saved.load(0, ["averager"])["averager"]["progress"], step)
        self.epoch, batch = divmod(step, now)
        self.loader.go_to(self.epoch, batch)
        if not is_evaluated:
            self.epoch = max(0, self.epoch - 1)
            _load_losses(self, loop["losses"])
        self.follow_schedule(step)

    def _restart_averager(self, progress: Mapping[str, Any], step: int) -> None:
        """Count on from `step`, in the round after that of `progress`, with all else new."""
        averager = self.averager
        kept = {name: progress[name] for name in ("first_loss", "loss")}
        averager.progress = Progress(step=step, round=progress["round"], round_step=step, mean_step=float(step), **kept)
        seed = (averager.generator.initial_seed() + step) % 2**63
        averager.generator.manual_seed(seed)
        random_state.seed_generators(seed)


# -- the parts of a rank's file: how each is saved, and how it is loaded from all of them ---------------------------


def _save_model(state: LoopState) -> dict[str, Any]:
    return {"model": state.averager.model.state_dict()}


def _load_model(state: LoopState, parts: Mapping[str, Any]) -> None:
    load_fitting(state.averager.model.load_state_dict, parts["model"], "model")


def _save_optimizer(state: LoopState) -> dict[str, Any]:
    return {"optimizer": state.averager.optimizer.state_dict()}


def _load_optimizer(state: LoopState, parts: Mapping[str, Any]) -> None:
    optimizer = state.averager.optimizer
    options = [dict(group) for group in optimizer.param_groups]
    load_fitting(optimizer.load_state_dict, parts["optimizer"], "optimizer")
    for own, given in zip(options, optimizer.param_groups, strict=True):  # torch looks at few of them
        check_form({name: own[name] for name in own if name != "params"}, given)


def _save_averager(state: LoopState) -> dict[str, Any]:
    averager = state.averager.state_dict()
    # A part of its own: all learners have the same mean in flight and outer momentum, which is then stored once.
    return {"means": averager.pop("averaging"), "averager": averager}


def _load_averager(state: LoopState, parts: Mapping[str, Any]) -> None:
    averager, saved = state.averager, parts["averager"]
    for name, own in {"progress": asdict(averager.progress), "totals": asdict(averager.totals)}.items():
        check_form({name: own}, {name: own | saved[name]})  # earlier versions lack fields
    check_form({"loss_sum": 0.0}, saved)
    averager.load_state_dict({**saved, "averaging": parts["means"]})


def _save_random(state: LoopState) -> dict[str, Any]:
    return {"random": random_state.save()}


def _load_random(state: LoopState, parts: Mapping[str, Any]) -> None:
    random_state.load(parts["random"])


def _save_loop(state: LoopState) -> dict[str, Any]:
    return {"loop": {name: entry.save(state) for name, entry in _LOOP.items()}}


def _load_loop(state: LoopState, parts: Mapping[str, Any]) -> None:
    refuse_unknown(parts["loop"], _LOOP)
    for name, entry in _LOOP.items():
        if name in parts["loop"] or not entry.is_later:
            entry.load(state, parts["loop"][name])


class _Part(NamedTuple):
    """Names of parts that are saved and loaded together, and how."""

    names: Sequence[str]
    save: Callable[[LoopState], dict[str, Any]]
    load: Callable[[LoopState, Mapping[str, Any]], None]


_PARTS = (
    _Part(["model"], _save_model, _load_model),
    _Part(["optimizer"], _save_optimizer, _load_optimizer),
    _Part(["means", "averager"], _save_averager, _load_averager),
    _Part(["random"], _save_random, _load_random),
    _Part(["loop"], _save_loop, _load_loop),
)


# -- the entries of the part "loop" ---------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """How an entry is saved and loaded. One that `is_later` may be absent, as in checkpoints of earlier versions."""

    save: Callable[[LoopState], Any]
    load: Callable[[LoopState, Any], None]
    is_later: bool = False


def _load_epoch(state: LoopState, epoch: int) -> None:
    state.epoch = int(epoch)


def _load_losses(state: LoopState, losses: Tensor) -> None:
    state.losses = list(losses.to(state.device))


def _load_totals(state: LoopState, saved: Mapping[str, Any]) -> None:
    refuse_unknown(saved, [member.name for member in fields(RunTotals)])
    state.totals = RunTotals(**saved)
    check_form(asdict(RunTotals()), asdict(state.totals))


def _load_scheduler(state: LoopState, saved: Any) -> None:
    if state.scheduler is not None:
        state.scheduler.load_state_dict(saved)


_LOOP: dict[str, _Entry] = {
    "epoch": _Entry(lambda state: state.epoch, _load_epoch),
    "losses": _Entry(lambda state: torch.stack(state.losses) if state.losses else torch.empty(0), _load_losses),
    "position": _Entry(
        lambda state: (state.loader.epoch, state.loader.batch),
        lambda state, position: state.loader.go_to(*map(int, position)),
    ),
    "passes": _Entry(lambda state: state.passes.state_dict(), lambda state, saved: state.passes.load_state_dict(saved)),
    "account": _Entry(lambda state: {**asdict(state.totals), "wall_s": state.wall_s}, _load_totals),
    "scheduler": _Entry(
        lambda state: None if state.scheduler is None else state.scheduler.state_dict(), _load_scheduler
    ),
}
