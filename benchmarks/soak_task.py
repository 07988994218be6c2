"""The digits task for `benchmarks.soak`, with ranks that die at a chosen place of a chosen step.

The environment variable `PLAN` names a JSON file: a list of ``{"rank", "place", "step"}`` with ranks as at the start. A
rank kills itself with SIGKILL when it first passes its place at its step or later. Survivors write
``survivor-RANK.json`` beside the plan: a hash of their parameters, the ranks lost, and the time that it cost.
"""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from hpcavg.averaging.averager import Averager
from hpcavg.averaging.delayed import Delayed
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.rounds import Rounds
from hpcavg.averaging.synchronous import Averaging
from hpcavg.checkpoints import store
from hpcavg.checkpoints.manager import CheckpointManager
from hpcavg.config.options import Config
from hpcavg.distributed.shrinking import SurvivingTopology
from hpcavg.engines import mpi as mpi_engine
from hpcavg.engines import neighbours, pending, shared
from hpcavg.tasks import Task, digits
from hpcavg.training.loop import Loop
from hpcavg.training.run_recorder import RunRecorder
from hpcavg.training.trainer import Trainer

PLAN = "HPCAVG_SOAK_PLAN"

# The phases of a run, and the places in each where a rank may die. In a collective: before it; after it, when others
# may not have their result yet; and told, when all have it and none has used it. In a mean also half: half of the
# rank's slice is written.
_COLLECTIVE = ("before", "after", "told")
_MEAN = ("before", "half", "after", "told")
PLACES: dict[str, tuple[str, ...]] = {
    "computation": ("step",),
    "local average": _MEAN,
    "global average": _MEAN,
    "ring average": _MEAN,
    "start of a delayed average": _COLLECTIVE,
    "delayed average on its way": ("half", "after"),
    "merge of a delayed average": ("before", "told"),
    "agreement on a round": _COLLECTIVE,
    "mean for an evaluation": _MEAN,
    "evaluation": _COLLECTIVE,
    "flush of records": _COLLECTIVE,
    "checkpoint": ("before", "file", "manifest", "after", "told"),
    "recovery": ("met", "shrunk", "split", "renewed", "moved"),
    "final average": _MEAN,
    "summary": (*_COLLECTIVE, "leaving"),
}
# The survivors need not notice this death.
LEAVING = "summary: leaving"


class Reaper:
    """Kills this process at its place in the plan, and measures what the deaths of others cost.

    Attributes
    ----------
    step : the current step.
    interrupted_s : seconds in collectives before a death interrupted them.
    """

    def __init__(self, plan: Path) -> None:
        self._folder = plan.parent
        self._plan: list[dict[str, Any]] = json.loads(plan.read_text())
        self._own: list[tuple[str, int]] | None = None
        self._is_in = threading.local()  # another thread takes delayed means
        self.model: nn.Module | None = None
        self.topology: SurvivingTopology | None = None
        self.step = 0
        self.interrupted_s = 0.0
        self._met_s = 0.0

    def meet(self) -> None:
        """Remember the time at which a death was noticed."""
        self._met_s = time.perf_counter()

    @property
    def what(self) -> str:
        """The phase that this thread is in."""
        return getattr(self._is_in, "what", "")

    @contextmanager
    def within(self, what: str) -> Iterator[None]:
        """Set the phase of this thread inside the block."""
        outer, self._is_in.what = self.what, what
        try:
            yield
        finally:
            self._is_in.what = outer

    def pass_by(self, place: str, what: str | None = None) -> None:
        """Die if the plan names this place and step."""
        if self.topology is None:
            return
        name = f"{self.what if what is None else what}: {place}"
        own = self._plan_of(self.topology.origin)
        if any(name == where and self.step >= step for where, step in own):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_due(self, place: str) -> bool:
        """Return whether `pass_by` would kill this process."""
        name = f"{self.what}: {place}"
        topology = self.topology
        return topology is not None and any(
            name == where and self.step >= step for where, step in self._plan_of(topology.origin)
        )

    def _plan_of(self, rank: int) -> list[tuple[str, int]]:
        if self._own is None:
            self._own = [(each["place"], each["step"]) for each in self._plan if each["rank"] == rank]
        return self._own

    def collective(self, run_collective: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap `run_collective` or `run_retryable` with the places of a collective."""

        @functools.wraps(run_collective)
        def wrapped(topology: SurvivingTopology, action: Callable[[], Any], *rest: Any, **more: Any) -> Any:
            def act() -> Any:
                self.pass_by("before")
                result = action()
                self.pass_by("after")
                return result

            entered_s, num_losses = time.perf_counter(), len(topology.losses)
            result = run_collective(topology, act, *rest, **more)
            if len(topology.losses) > num_losses:
                # Of several deaths in one collective the last counts; the time before it is recovery or waiting.
                recovered_s = sum(loss.recovery_s for loss in topology.losses[num_losses:-1])
                self.interrupted_s += self._met_s - entered_s - recovered_s
            self.pass_by("told")
            return result

        return wrapped

    def inside(self, function: Callable[..., Any], what: Callable[..., str] | str) -> Callable[..., Any]:
        """Wrap `function` in the phase `what`, or in the one that `what` returns for the arguments."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            with self.within(what if isinstance(what, str) else what(*arguments, **more)):
                return function(*arguments, **more)

        return wrapped

    def before(self, function: Callable[..., Any], place: str, what: str | None = None) -> Callable[..., Any]:
        """Wrap `function` with a place before it."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            self.pass_by(place, what)
            return function(*arguments, **more)

        return wrapped

    def after(self, function: Callable[..., Any], place: str, what: str | None = None) -> Callable[..., Any]:
        """Wrap `function` with a place after it."""

        @functools.wraps(function)
        def wrapped(*arguments: Any, **more: Any) -> Any:
            result = function(*arguments, **more)
            self.pass_by(place, what)
            return result

        return wrapped

    def install(self) -> None:
        """Patch the places into the classes of hpcavg, in this process."""
        patch = _Patch(self)
        patch.collectives()
        patch.means()
        patch.recovery()
        atexit.register(self.leave)

    def leave(self) -> None:
        """Write the file of a survivor."""
        topology, model = self.topology, self.model
        if topology is None or model is None:
            return
        bits = hashlib.sha256()
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            bits.update(tensor.detach().contiguous().numpy().tobytes())
        found = {
            "rank": topology.origin,
            "sha256": bits.hexdigest(),
            "losses": [[*loss.ranks] for loss in topology.losses],
            "recovery_s": [loss.recovery_s for loss in topology.losses],
            "interrupted_s": self.interrupted_s,
        }
        (self._folder / f"survivor-{topology.origin}.json").write_text(json.dumps(found))


class _Patch:
    """Patches the places into hpcavg, a method for each kind."""

    def __init__(self, reaper: Reaper) -> None:
        self.reaper = reaper

    def _in(self, owner: Any, name: str, what: Callable[..., str] | str) -> None:
        _replace(owner, name, self.reaper.inside(getattr(owner, name), what))

    def _before(self, owner: Any, name: str, place: str, what: str | None = None) -> None:
        _replace(owner, name, self.reaper.before(getattr(owner, name), place, what))

    def _after(self, owner: Any, name: str, place: str, what: str | None = None) -> None:
        _replace(owner, name, self.reaper.after(getattr(owner, name), place, what))

    def collectives(self) -> None:
        """Patch all collectives of the topology, and name their phases."""
        reaper, step = self.reaper, Averager.step
        for name in ("run_collective", "run_retryable"):
            _replace(SurvivingTopology, name, reaper.collective(getattr(SurvivingTopology, name)))

        def counted(averager: Averager, *arguments: Any, **more: Any) -> None:
            reaper.topology = averager.topology  # type: ignore[assignment]
            # At their own pace, slow learners get as far as the mean of all.
            reaper.step = max(averager.progress.step + 1, round(averager.progress.mean_step))
            reaper.pass_by("step", "computation")
            step(averager, *arguments, **more)

        _replace(Averager, "step", counted)
        self._in(Averaging, "take", lambda averaging, scope, progress, told: f"{scope} average")
        self._in(Averaging, "take_final", "final average")
        self._in(Averaging, "replace_by_mean", "mean for an evaluation")
        self._in(Delayed, "start", "start of a delayed average")
        self._in(Delayed, "collect", "merge of a delayed average")
        self._in(Rounds, "_agree", "agreement on a round")
        self._in(Loop, "_evaluate", "evaluation")
        self._in(Trainer, "_conclude", "summary")
        self._in(RunRecorder, "flush", "flush of records")
        self._in(CheckpointManager, "write", "checkpoint")
        self._before(SurvivingTopology, "free", "leaving", "summary")
        self._before(store, "write_rank", "file")
        self._before(store, "commit", "manifest")

    def means(self) -> None:
        """Patch the middle of a mean: half of the slice is written, or MPI has summed the first array."""
        reaper, average, step = self.reaper, shared.average, pending.SteppedMean.step

        def half(rows: Any, targets: Any, start: int, end: int, count: int) -> None:
            if reaper.is_due("half"):
                average(rows, targets, start, (start + end) // 2, count)
                reaper.pass_by("half")
            average(rows, targets, start, end, count)

        def watched(mean: pending.SteppedMean) -> bool:
            with reaper.within("delayed average on its way"):
                got_on = step(mean)
                if got_on and mean.is_complete:
                    reaper.pass_by("after")
                return got_on

        _replace(shared, "average", half)
        _replace(pending.SteppedMean, "step", watched)
        self._before(mpi_engine, "spread", "half")
        self._before(neighbours, "_add_weighted", "half")

    def recovery(self) -> None:
        """Patch the recovery from others' deaths."""
        reaper, recover, split = self.reaper, SurvivingTopology.recover, SurvivingTopology._split

        def recovering(topology: SurvivingTopology, error: Any) -> None:
            reaper.meet()
            with reaper.within("recovery"):
                reaper.pass_by("met")
                recover(topology, error)

        def splitting(topology: SurvivingTopology, everyone: Any) -> None:
            is_recovering = reaper.what == "recovery"
            if is_recovering:
                reaper.pass_by("shrunk")
            split(topology, everyone)
            if is_recovering:
                reaper.pass_by("split")

        _replace(SurvivingTopology, "recover", recovering)
        _replace(SurvivingTopology, "_split", splitting)
        self._before(Replica, "_reallocate", "renewed")
        self._after(Replica, "_reallocate", "moved")


def _replace(owner: Any, name: str, function: Callable[..., Any]) -> None:
    setattr(owner, name, function)


def task(config: Config) -> Task:
    """Return the digits task with a perceptron whose means are taken in slices, and this process under the reaper."""
    reaper = Reaper(Path(os.environ[PLAN]))
    reaper.install()

    def build_model() -> nn.Module:
        reaper.model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(),
            nn.Linear(128, 10),
        )  # fmt: skip
        return reaper.model

    return Task("digits", build_model, digits.load_data)
