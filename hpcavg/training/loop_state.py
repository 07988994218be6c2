"""The state of a rank's training loop: what a checkpoint holds of it by learner, and how it goes on from one.

Each part is saved and loaded by two functions that stand side by side here. New content of checkpoints takes an entry
in `_LOOP`, or a pair of functions, and the code that owns the content. The names inside checkpoints stay for ever: runs
of all earlier versions are resumed by them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import resume
from hpcavg.checkpoints.form import check_form, load_fitting
from hpcavg.checkpoints.store import Checkpoint
from hpcavg.config.options import Config
from hpcavg.results.view import Positions
from hpcavg.training.forward_backward import ForwardBackward
from hpcavg.training.learners import Learners
from hpcavg.training.loader import BatchLoader
from hpcavg.training.run_totals import RunTotals
from hpcavg.utils.format_version import refuse_unknown


@dataclass
class LoopState:
    """What a rank's learners train with, and how far they have come.

    Parameters
    ----------
    config : Config
        The run's options.
    device : torch.device
        Where the model is.
    averager : Averager
        Holds the model and the optimizer, too.
    learners : Learners
        The models and random generators of the rank's learners.
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
    losses : list of lists of Tensor
        Training losses since then of each learner, on the device.
    segments : sequence of Positions
        History of the metrics; see `view.continued`.
    """

    config: Config
    device: torch.device
    averager: Averager
    learners: Learners
    passes: ForwardBackward
    loader: BatchLoader
    scheduler: LRScheduler | None
    total_steps: int
    totals: RunTotals = field(default_factory=RunTotals)
    epoch: int = 0
    losses: list[list[Tensor]] = field(default_factory=list)
    segments: Sequence[Positions] = ()
    _started_s: float | None = None

    def __post_init__(self) -> None:
        self.totals = RunTotals([0] * len(self.learners), [math.nan] * len(self.learners))
        self.losses = [[] for _ in range(len(self.learners))]

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

    def parts(self) -> list[dict[str, Any]]:
        """Return the state of each learner, by the parts of its file."""
        return [
            {name: value for part in _PARTS for name, value in part.save(self, row).items()}
            for row in range(len(self.learners))
        ]

    def about(self, positions: Positions) -> dict[str, Any]:
        """Return what the manifest says of the run; `positions` are those of all learners' metrics."""
        return {
            "steps_per_epoch": self.loader.steps_per_epoch,
            "num_samples": len(self.loader.data.train_inputs),
            "metrics": {"resumed": self.segments, "positions": positions},
        }

    def is_of_as_many(self, saved: Checkpoint) -> bool:
        """Return whether as many learners wrote the checkpoint as there are now."""
        return saved.manifest.num_ranks == self.averager.topology.num_learners

    def go_on_from(self, saved: Checkpoint) -> None:
        """Restore this rank's learners from `saved`; if it is of another number, go on from the mean of all in it."""
        resume.check_data(self.config, saved, len(self.loader.data.train_inputs))
        if self.is_of_as_many(saved):
            self._restore([saved.load(learner) for learner in self.averager.topology.learners])
        else:
            self._start_from_mean(saved)

    def _restore(self, of_learners: Sequence[Mapping[str, Any]]) -> None:
        for parts in of_learners:
            refuse_unknown(parts, [name for part in _PARTS for name in part.names])
        for part in _PARTS:
            part.load(self, of_learners)

    def _start_from_mean(self, saved: Checkpoint) -> None:
        """Go on from the mean model, which the model already holds: with everything new but progress and epochs."""
        before, now = saved.manifest.about["steps_per_epoch"], self.loader.steps_per_epoch
        step = saved.manifest.step
        loops = [
            saved.load(learner % saved.manifest.num_ranks, ["loop"])["loop"]
            for learner in self.averager.topology.learners
        ]
        is_evaluated = step < (loops[0]["epoch"] + 1) * before
        if (
            self.config.run.steps is None
        ):  # the run's length is counted in epochs, which have other numbers of steps now
            step = round(step * now / before)
        step = min(step, self.total_steps)
        self._restart_averager(saved.load(0, ["averager"])["averager"]["progress"], step)
        self.epoch, batch = divmod(step, now)
        self.loader.go_to([(self.epoch, batch)] * len(self.learners))
        if not is_evaluated:
            self.epoch = max(0, self.epoch - 1)
            _load_losses(self, [loop["losses"] for loop in loops])
        self.follow_schedule(step)

    def _restart_averager(self, progress: Mapping[str, Any], step: int) -> None:
        """Count on from `step`, in the round after that of `progress`, with all else new."""
        self.averager.restart_at(step, progress)
        seeds = [(generator.initial_seed() + step) % 2**63 for generator in self.averager.generators]
        for generator, seed in zip(self.averager.generators, seeds, strict=True):
            generator.manual_seed(seed)
        self.learners.seed(seeds)


# -- the parts of a learner's file: how each is saved, and how it is loaded from those of all learners of the rank -----


def _save_model(state: LoopState, row: int) -> dict[str, Any]:
    return {"model": state.learners.state_of(row)}


def _load_model(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    state.learners.load_states([parts["model"] for parts in of_learners])


def _save_optimizer(state: LoopState, row: int) -> dict[str, Any]:
    return {"optimizer": state.averager.optimizer_state_of(row)}


def _load_optimizer(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    averager = state.averager
    options = [dict(group) for group in averager.optimizer.param_groups]
    load_fitting(averager.load_optimizer_states, [parts["optimizer"] for parts in of_learners], "optimizer")
    for own, given in zip(options, averager.optimizer.param_groups, strict=True):  # torch looks at few of them
        check_form({name: own[name] for name in own if name != "params"}, given)


def _save_averager(state: LoopState, row: int) -> dict[str, Any]:
    averager = state.averager.state_dict_of(row)
    # A part of its own: all learners have the same mean in flight and outer momentum, which is then stored once.
    return {"means": averager.pop("averaging"), "averager": averager}


def _load_averager(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    averager = state.averager
    for saved in (parts["averager"] for parts in of_learners):
        for name, own in {"progress": asdict(averager.progress), "totals": asdict(averager.totals)}.items():
            check_form({name: own}, {name: own | saved[name]})  # earlier versions lack fields
        check_form({"loss_sum": 0.0}, saved)
    averager.load_state_dicts([{**parts["averager"], "averaging": parts["means"]} for parts in of_learners])


def _save_random(state: LoopState, row: int) -> dict[str, Any]:
    return {"random": state.learners.random_of(row)}


def _load_random(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    state.learners.load_random([parts["random"] for parts in of_learners])


def _save_loop(state: LoopState, row: int) -> dict[str, Any]:
    return {"loop": {name: entry.save(state, row) for name, entry in _LOOP.items()}}


def _load_loop(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    loops = [parts["loop"] for parts in of_learners]
    for loop in loops:
        refuse_unknown(loop, _LOOP)
    for name, entry in _LOOP.items():
        if name in loops[0] or not entry.is_later:
            entry.load(state, [loop[name] for loop in loops])


class _Part(NamedTuple):
    """Names of parts that are saved and loaded together, and how: saved for one learner, loaded for all of a rank."""

    names: Sequence[str]
    save: Callable[[LoopState, int], dict[str, Any]]
    load: Callable[[LoopState, Sequence[Mapping[str, Any]]], None]


_PARTS = (
    _Part(["model"], _save_model, _load_model),
    _Part(["optimizer"], _save_optimizer, _load_optimizer),
    _Part(["means", "averager"], _save_averager, _load_averager),
    _Part(["random"], _save_random, _load_random),
    _Part(["loop"], _save_loop, _load_loop),
)


# -- the entries of the part "loop" ---------------------------------------------------------------------------------


class _Entry(NamedTuple):
    """How an entry is saved for a learner, and loaded from those of all learners of a rank.

    One that `is_later` may be absent, as in checkpoints of earlier versions.
    """

    save: Callable[[LoopState, int], Any]
    load: Callable[[LoopState, Sequence[Any]], None]
    is_later: bool = False


def _load_epoch(state: LoopState, epochs: Sequence[int]) -> None:
    state.epoch = int(epochs[0])


def _save_losses(state: LoopState, row: int) -> Tensor:
    return torch.stack(state.losses[row]) if state.losses[row] else torch.empty(0)


def _load_losses(state: LoopState, of_learners: Sequence[Tensor]) -> None:
    state.losses = [list(losses.to(state.device)) for losses in of_learners]


def _load_totals(state: LoopState, of_learners: Sequence[Mapping[str, Any]]) -> None:
    for saved in of_learners:
        refuse_unknown(saved, [member.name for member in fields(RunTotals)])
    state.totals = RunTotals.from_learners(of_learners)
    check_form(RunTotals().of_learner(0), state.totals.of_learner(0))


def _load_scheduler(state: LoopState, of_learners: Sequence[Any]) -> None:
    if state.scheduler is not None:
        state.scheduler.load_state_dict(of_learners[0])


_LOOP: dict[str, _Entry] = {
    "epoch": _Entry(lambda state, _: state.epoch, _load_epoch),
    "losses": _Entry(_save_losses, _load_losses),
    "position": _Entry(
        lambda state, row: state.loader.positions[row],
        lambda state, positions: state.loader.go_to([(int(epoch), int(batch)) for epoch, batch in positions]),
    ),
    "passes": _Entry(
        lambda state, _: state.passes.state_dict(), lambda state, saved: state.passes.load_state_dict(saved[0])
    ),
    "account": _Entry(lambda state, row: {**state.totals.of_learner(row), "wall_s": state.wall_s}, _load_totals),
    "scheduler": _Entry(
        lambda state, _: None if state.scheduler is None else state.scheduler.state_dict(), _load_scheduler
    ),
}
