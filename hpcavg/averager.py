"""The averager: carries out a rule around the user's optimizer."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.flat import FlatBuffer
from hpcavg.gradients import GradientBuffer
from hpcavg.mean import select
from hpcavg.merge import Merge, replace
from hpcavg.optimizer_state import POLICIES as STATE_POLICIES
from hpcavg.optimizer_state import StateAverager
from hpcavg.rule import Rule
from hpcavg.schedule import Progress, Scope
from hpcavg.topology import Topology

BUFFER_POLICIES = ("average", "keep", "recompute")


@dataclass(frozen=True)
class Event:
    """One mean that was taken.

    Attributes
    ----------
    step : the step it belongs to. scope : over whom.
    started_s : when it started, in seconds since the averager was made.
    blocked_s : how long this learner could not compute because of it.
    in_flight_s : from its start until it was there; equal to `blocked_s` for a blocking mean.
    num_bytes : what this learner brought into it.
    consensus_distance : (1/P) Σ ||x_j - x̄||² before the mean was merged; NaN where it was not measured.
    """

    step: int
    scope: Scope
    started_s: float
    blocked_s: float
    in_flight_s: float
    num_bytes: int
    consensus_distance: float = math.nan


@dataclass
class Totals:
    """Sums over all events of a run."""

    local_averages: int = 0
    global_averages: int = 0
    bytes_averaged: int = 0
    blocked_s: float = 0.0
    in_flight_s: float = 0.0


class Averager:
    """Model averaging for a training loop: call `step` where the loop called ``optimizer.step``.

    The parameters that require a gradient, in the model or in the optimizer, become views of one flat buffer per
    dtype. Every learner starts from rank 0's parameters and buffers, the frozen ones too; frozen parameters are then
    left alone, and it is an error to unfreeze one later.

    Parameters
    ----------
    model, optimizer : any module and any torch optimizer over its parameters; the same on every rank.
    algorithm : a rule from `hpcavg.algorithms`.
    topology : the learners.
    engine : how means are taken: ``"auto"`` or a name in `hpcavg.mean.ENGINES`.
    buffers : what happens to floating-point buffers (BatchNorm statistics): ``"average"`` them with the parameters,
        ``"keep"`` each learner's own to the end, or ``"recompute"`` them on the averaged model, for which
        `finish` needs batches.
    optimizer_state : at a global mean ``"keep"`` each learner's state, ``"average"`` it, or ``"reset"`` it.
    seed : seeds `generator`, this learner's own stream of random numbers; torch's default generator is left alone.

    Attributes
    ----------
    events : the latest means taken, oldest first; the caller may clear it. totals : sums over all of them.
    progress : steps taken. generator : this learner's ``torch.Generator``.

    Raises `InputError` on every rank for an unknown policy or engine, or when the learners' models differ in form.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Rule,
        topology: Topology,
        engine: str = "auto",
        buffers: str = "average",
        optimizer_state: str = "keep",
        seed: int = 0,
    ) -> None:
        if not isinstance(algorithm, Rule):
            raise InputError("algorithm", algorithm, "a rule of hpcavg.algorithms, such as algorithms.k_avg(8)")
        if buffers not in BUFFER_POLICIES:
            raise InputError("buffers", buffers, f"one of {', '.join(BUFFER_POLICIES)}")
        if optimizer_state not in STATE_POLICIES:
            raise InputError("optimizer_state", optimizer_state, f"one of {', '.join(STATE_POLICIES)}")
        self.model = model
        self.optimizer = optimizer
        self.algorithm = algorithm
        self.topology = topology
        self.engine = select(engine, topology)
        self.progress = Progress()
        self.events: deque[Event] = deque(maxlen=2**16)
        self.totals = Totals()
        # Odd multiplier: distinct for every learner of a seed, and far apart for neighbouring seeds.
        self.generator = torch.Generator().manual_seed((seed * 1_000_003 + topology.rank) % 2**63)
        self._buffer_policy = buffers
        self._state_policy = optimizer_state
        self._start_s = time.perf_counter()
        self._learners_agree = False

        flats = topology.do_together(self._make_flat_buffers)
        self._parameters, self._buffers = flats
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        unaveraged = [*self._frozen, *((name, b) for name, b in model.named_buffers() if not b.is_floating_point())]
        self._check_same_on_all_learners(unaveraged)
        for tensor in (*self._parameters.arrays, *self._buffers.arrays, *(tensor for _, tensor in unaveraged)):
            self._broadcast(tensor)
        self._averaged = [self._parameters, self._buffers] if buffers == "average" else [self._parameters]
        self._merge_states = [algorithm.how.init(array) for array in self._parameters.arrays]
        self._gradients = GradientBuffer(self._parameters, topology) if algorithm.averages == "gradients" else None
        self._state = StateAverager(optimizer, topology)

    # -- construction ---------------------------------------------------------------------------------------------

    def _make_flat_buffers(self) -> tuple[FlatBuffer, FlatBuffer]:
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        for index, group in enumerate(self.optimizer.param_groups):
            named += [(f"optimizer.{index}.{i}", p) for i, p in enumerate(group["params"]) if p.requires_grad]
        buffers = [(name, b) for name, b in self.model.named_buffers() if b.is_floating_point()]
        return FlatBuffer(named), FlatBuffer(buffers)

    def _check_same_on_all_learners(self, unaveraged: list[tuple[str, Tensor]]) -> None:
        own = self._parameters.signature() + self._buffers.signature()
        own += [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in unaveraged]
        first = self.topology.world.bcast(own, root=0)
        error = None
        if own != first:
            here, there = next(
                (pair for pair in zip(own, first, strict=False) if pair[0] != pair[1]),
                (f"{len(own)} tensors", f"{len(first)} tensors"),
            )
            error = InputError("model", f"{here} on rank {self.topology.rank}", f"{there}, as on rank 0")
        self.topology.agree(error)

    def _broadcast(self, tensor: Tensor) -> None:
        """Give every learner rank 0's values of `tensor`."""
        host = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        for chunk in host.split(2**30):
            self.topology.world.Bcast(chunk.numpy(), root=0)
        tensor.detach().copy_(host.view(tensor.dtype).view(tensor.shape))

    # -- the loop -------------------------------------------------------------------------------------------------

    def step(
        self,
        loss: float | Tensor | None = None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], float] | None = None,
    ) -> None:
        """Take the optimizer's step and whatever averaging is due. Collective where a mean is due.

        Parameters
        ----------
        loss : the step's training loss, for rules whose period follows it; the others ignore it.
        scaler : an AMP gradient scaler; ``scaler.step`` is called instead of ``optimizer.step``, and ``scaler.update``
            stays with the caller. A step it skips counts all the same, so that the learners stay together.
        closure : passed to optimizers that need one. Refused where a mean comes before the step: the closure would
            take its gradients anew, after it.
        """
        if closure is not None and self.algorithm.before_step:
            raise InputError("closure", closure, f"left out: {self.algorithm.name} averages before the step")
        progress = self.progress
        progress.step += 1
        due = self.algorithm.when(progress)
        if due is not None and self.algorithm.before_step:
            self._average(due)
        if scaler is not None:
            scaler.step(self.optimizer)
        elif closure is not None:
            self.optimizer.step(closure)
        else:
            self.optimizer.step()
        self._learners_agree = False
        if due is not None and not self.algorithm.before_step:
            self._average(due)
        if due is Scope.GLOBAL:
            progress.round += 1
            progress.round_step = progress.step

    def finish(self, batches: Iterable[Any] | None = None) -> None:
        """Take the final global mean: every learner then holds the run's model. Collective over all learners.

        It is left out where the last step took it. batches : training inputs, needed where buffers are recomputed; see
        `recompute_buffers`.
        """
        if not self._learners_agree:
            started = time.perf_counter()
            self._record(Scope.GLOBAL, started, self._average_parameters(Scope.GLOBAL, replace))
        if self._buffer_policy == "recompute":
            if batches is None:
                raise InputError("batches", None, "training batches, because buffers='recompute'")
            self.recompute_buffers(batches)

    @contextmanager
    def mean_model(self, batches: Iterable[Any] | None = None) -> Iterator[torch.nn.Module]:
        """Let the model hold the mean over all learners inside the block; afterwards it is what it was, bit for bit.

        Collective over all learners. Needs room for one more copy of the parameters. It is no part of the algorithm:
        it appears neither in `events` nor in `totals`.
        """
        flats = (self._parameters, self._buffers)
        saved = [flat.snapshot() for flat in flats]
        try:
            if not self._learners_agree:
                for flat in self._averaged:
                    self._take_mean(flat)
            if self._buffer_policy == "recompute" and batches is not None:
                self.recompute_buffers(batches)
            yield self.model
        finally:
            for flat, arrays in zip(flats, saved, strict=True):
                flat.restore(arrays)

    def recompute_buffers(self, batches: Iterable[Any]) -> None:
        """Re-estimate the BatchNorm statistics of the model as it is on `batches`, then average them over all learners.

        batches : inputs, or sequences whose first element is the input, of this learner's training data.
        """
        with torch.no_grad():
            torch.optim.swa_utils.update_bn(batches, self.model)
            self._take_mean(self._buffers)

    # -- means ----------------------------------------------------------------------------------------------------

    def _average(self, scope: Scope) -> None:
        """Take the mean that is due, of what the rule averages."""
        started = time.perf_counter()
        if self._gradients is None:
            num_bytes = self._average_parameters(scope, self.algorithm.how)
        else:
            self._parameters.refresh()
            self._gradients.average(self.engine, scope)
            num_bytes = self._gradients.num_bytes
        self._record(scope, started, num_bytes)

    def _average_parameters(self, scope: Scope, how: Merge) -> int:
        """Take the mean over `scope` and merge it; return the bytes this learner brought in.

        A global mean of the parameters is merged by `how`; local means and buffers are replaced.
        """
        num_bytes = 0
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise InputError(
                    "model", name, "frozen as when it was handed over; unfreeze before making the Averager"
                )
        with torch.no_grad():
            for flat in self._averaged:
                flat.refresh()
                num_bytes += flat.num_bytes
                for index, array in enumerate(flat.arrays):
                    if scope is Scope.GLOBAL and flat is self._parameters:
                        self._mean_and_merge(array, scope, how, self._merge_states[index])
                    else:
                        self._mean_and_merge(array, scope, replace, {})
        if scope is Scope.GLOBAL:
            if self._state_policy == "average":
                num_bytes += self._state.average(self.engine)
            elif self._state_policy == "reset":
                self.optimizer.state.clear()
            self._learners_agree = how.overwrites
        return num_bytes

    def _take_mean(self, flat: FlatBuffer) -> None:
        """Replace the tensors of `flat` by their mean over all learners."""
        with torch.no_grad():
            flat.refresh()
            for array in flat.arrays:
                self._mean_and_merge(array, Scope.GLOBAL, replace, {})

    def _mean_and_merge(self, array: Tensor, scope: Scope, merge: Merge, state: dict[str, Tensor]) -> None:
        if merge.overwrites and array.shape[0] == 1:
            self.engine.mean(array, array[0], scope)  # formed in place: no copy, nothing left to merge
        else:
            mean = torch.empty_like(array[0])
            self.engine.mean(array, mean, scope)
            merge.apply(array, mean, state)

    def _record(self, scope: Scope, started: float, num_bytes: int) -> None:
        blocked_s = time.perf_counter() - started
        self.events.append(Event(self.progress.step, scope, started - self._start_s, blocked_s, blocked_s, num_bytes))
        if scope is Scope.LOCAL:
            self.totals.local_averages += 1
        else:
            self.totals.global_averages += 1
        self.totals.bytes_averaged += num_bytes
        self.totals.blocked_s += blocked_s
        self.totals.in_flight_s += blocked_s

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the states of model and optimizer, as plain values and tensors."""
        return {
            "algorithm": self.algorithm.name,
            "options": dict(self.algorithm.options),
            "progress": asdict(self.progress),
            "totals": asdict(self.totals),
            "generator": self.generator.get_state(),
            "merge": [dict(state) for state in self._merge_states],
            "learners_agree": self._learners_agree,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; raises `InputError` where it belongs to another rule."""
        given = (state["algorithm"], state["options"])
        if given != (self.algorithm.name, dict(self.algorithm.options)):
            raise InputError("state", given, f"that of {self.algorithm.name} with {self.algorithm.options}")
        self.progress = Progress(**state["progress"])
        self.totals = Totals(**state["totals"])
        self.generator.set_state(state["generator"])
        for own, saved in zip(self._merge_states, state["merge"], strict=True):
            for key, value in saved.items():
                own[key].copy_(value)
        self._learners_agree = state["learners_agree"]
