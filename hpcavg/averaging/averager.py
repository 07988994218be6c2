"""The averager: carries out a rule around the user's optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run
from hpcavg.algorithms.scope import GLOBAL, SERVER
from hpcavg.averaging.calls import Caller, Kind
from hpcavg.averaging.checks import changed, check_alike, check_rule, check_step, check_wire, timeout_s
from hpcavg.averaging.events import Arrival, Event, Totals
from hpcavg.averaging.parameter_server import Worker
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.rounds import Rounds
from hpcavg.averaging.server import Server
from hpcavg.averaging.synchronous import Averaging
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.watchdog import watch_over
from hpcavg.engines.compression import wire_format
from hpcavg.engines.select import CPU, select_engine
from hpcavg.errors import InputError


class Averager:
    """Model averaging for a training loop: call `step` where the loop called ``optimizer.step``.

    The parameters that require a gradient, in the model or in the optimizer, become views of one flat buffer per
    dtype. Every learner starts from rank 0's parameters and buffers, the frozen ones too; frozen parameters are then
    left alone, and it is an error to unfreeze one later.

    Parameters
    ----------
    model : any module that torch neither synchronises nor shards itself (DistributedDataParallel, FSDP); the same on
        every rank.
    optimizer : any torch optimizer over its parameters; the same on every rank.
    algorithm : a rule from `hpcavg.algorithms`.
    topology : the learners, and the servers of an asynchronous algorithm. None: ``Topology()``.
    options : an `hpcavg.AveragingOptions`. None: its defaults.
    changes : fields of `options` that are to be others, for example ``buffers="keep"``.

    Attributes
    ----------
    events : the latest means and exchanges, oldest first; the caller may clear it.
    totals : sums over all of them.
    progress : steps taken.
    generator : this learner's ``torch.Generator``.
    supervisor : the thread that watches over this rank, for `hpcavg.distributed.preemption`.

    Raises
    ------
    InputError
        On every rank, for a value that cannot be used, for options that exclude each other, or if the learners' models,
        rules or options differ.
    TypeError
        For an unknown option.
    MismatchError
        By every method, on all learners, if they meet in different calls, because one took fewer steps or called
        `mean_model` alone.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import Averager, Topology, algorithms
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> topology = Topology()
    >>> averager = Averager(model, optimizer, algorithms.k_avg(k=2), topology)
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 2)).mean().backward()
    ...     averager.step()
    >>> averager.finish()
    >>> [(event.step, event.scope.name) for event in averager.events]
    [(2, 'global'), (4, 'global')]
    >>> topology.free()
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        algorithm: Rule,
        topology: Topology | None = None,
        options: AveragingOptions | None = None,
        **changes: Any,
    ) -> None:
        topology = topology or Topology()
        options = topology.run_on_all_ranks(partial(changed, options, changes))
        topology.run_on_all_ranks(partial(check_rule, algorithm, options, topology))
        number = topology.num_averagers
        check_alike(topology, algorithm, options, type(optimizer).__name__, number)
        topology.num_averagers += 1
        self.supervisor = watch_over(topology, timeout_s(options)).supervisor
        self.model, self.optimizer = model, optimizer
        self.algorithm = algorithm
        self.topology = topology
        self.progress = Progress()
        self.events: deque[Event] = deque(maxlen=2**16)
        self.totals = Totals()
        # Odd multiplier: distinct for every learner of a seed, and far apart for neighbouring seeds.
        self.generator = torch.Generator().manual_seed((options.seed * 1_000_003 + topology.learners.start) % 2**63)
        self._run = run = Run(topology.num_learners, topology.learners.start, options.total_steps, options.batch_size)
        self._due = algorithm.when(run)
        self._buffer_policy = options.buffers
        self._has_finished = False
        self._is_lent = False  # the model holds the mean for a while
        self._worker: Worker | None = None
        self._server: Server | None = None
        devices = (parameter.device for group in optimizer.param_groups for parameter in group["params"])
        with topology.waiting("set-up of the averager", SERVER):
            form = wire_format(options.wire_dtype, options.error_feedback)
            self.engine = select_engine(options.engine, topology, next(devices, CPU), form)
            check_wire(algorithm, self.engine, topology, options.wire_dtype)
            self._set_up_optimizer()
            self._rounds = Rounds(algorithm, run, topology, optimizer)
            self._replica = replica = Replica(model, optimizer, topology, self.engine, options.start)
            self._caller = Caller(algorithm, topology, number)
            self._averaging = Averaging(algorithm, self.engine, topology, optimizer, replica, options, self._caller)
            if topology.is_server:
                self._server = Server(replica.parameters, topology)
            elif algorithm.server is not None:
                self._worker = Worker(algorithm.server, replica, topology, optimizer, options.non_finite, options.start)

    def _set_up_optimizer(self) -> None:
        """Give the optimizer the settings that the rule asks for."""
        for group in self.optimizer.param_groups:
            for name, value in self.algorithm.optimizer.items():
                if name not in group:
                    kind = type(self.optimizer).__name__
                    raise InputError(
                        "optimizer", kind, f"torch.optim.SGD, which has the {name} of {self.algorithm.name}"
                    )
                group[name] = value

    # -- where the run stands -------------------------------------------------------------------------------------

    @property
    def agreed_step(self) -> float | None:
        """Steps taken by every learner, or by the mean learner where they go at their own pace.

        None while learners may be anywhere, which is between the means of a rule with own pace; whatever all of them
        do together must wait until it is a number.
        """
        progress = self.progress
        if not self.algorithm.own_pace or self.topology.num_learners == 1:
            return progress.step
        return progress.mean_step if progress.step == progress.round_step else None

    @property
    def done(self) -> bool:
        """Whether `total_steps` have been taken, by all learners alike; always on a server, which takes none."""
        step, total_steps = self.agreed_step, self._run.total_steps
        return self.topology.is_server or (step is not None and total_steps is not None and step >= total_steps)

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
        check_step(self.algorithm, self.topology, loss, closure is not None)
        self._check_kept("step")
        if self._worker is not None and self._worker.is_finished:
            raise InputError("step", self.progress.step + 1, "taken before finish: the servers have left")
        rule, progress, averaging = self.algorithm, self.progress, self._averaging
        if progress.step == 0:
            self._follow_start()
        progress.step += 1
        self._rounds.begin_step(progress, loss)
        due = self._due(progress)
        if due is not None and rule.before_step:
            self._record(averaging.take(due, progress))
        if scaler is not None:
            scaler.step(self.optimizer)
        elif closure is not None:
            self.optimizer.step(closure)
        else:
            self.optimizer.step()
        averaging.learners_agree = False
        if averaging.merge_step == progress.step:
            self._record(averaging.merge(progress))
        if due is GLOBAL and rule.delay_steps:
            averaging.start(progress)
        elif due is not None and not rule.before_step:
            self._record(averaging.take(due, progress))
        if due is GLOBAL:
            self._rounds.end(progress)
        if self._worker is not None:
            event = self._worker.exchange(progress)
            if event is not None:
                self._record(event)
                self._rounds.end(progress)
        self.supervisor.begin_step(progress.step + 1)
        averaging.equality.raise_alarm()

    def finish(self, batches: Iterable[Any] | None = None) -> None:
        """Merge what is in flight and take the final global mean: every learner then holds the run's model.

        Collective over all ranks; a server serves until then. The mean is left out where the last step took it. The
        model of an asynchronous run is the centre. batches : training inputs, needed where buffers are recomputed; see
        `recompute_buffers`.
        """
        averaging, progress = self._averaging, self.progress
        self._check_kept("finish")
        self._check_together("finish")
        has_finished = self._has_finished
        self._has_finished = True
        if self._server is not None:
            for _ in self.serve():
                pass
            self._server.finish()
            if not has_finished:
                self._replica.share_buffers()
            return
        if self._worker is not None:
            self._worker.say_goodbye(progress)
        averaging.look_whether_agreed(Kind.FINISH, progress)
        if averaging.merge_step is not None:
            self._record(averaging.merge(progress))
        if self._worker is not None:
            self._worker.finish()
            if self._buffer_policy == "average":
                averaging.replace_by_mean(Kind.FINISH, progress, self._replica.buffers)
        elif not averaging.learners_agree:
            self._record(averaging.take_final(progress))
        averaging.learners_agree = True
        averaging.equality.raise_alarm()
        if self._buffer_policy == "recompute":
            if batches is None:
                raise InputError("batches", None, "training batches, because buffers='recompute'")
            self.recompute_buffers(batches)
        if self._worker is not None and not has_finished:
            self._replica.share_buffers()

    def check_health(self, what: str) -> None:
        """Raise `SickLearnersError` where no mean could be taken now: `what` is about to happen would be worth nothing.

        Collective over all learners, which stand together. What `non_finite` says counts as it does at a mean.
        """
        self._check_together("check_health")
        self._averaging.check_health(self.progress, what)

    def reset_anchor(self) -> None:
        """Go on from the parameters as they are now: weights were loaded on all ranks, in the middle of a run.

        What was remembered of the former parameters is forgotten: SlowMo's and DiLoCo's anchor and momentum, a mean in
        flight, the centre on the servers. Not needed before the first step. Collective over all learners; a server
        returns at once. Raises `InputError` on all learners where their parameters differ.
        """
        if self._server is None:
            self._check_kept("reset_anchor")
            self._check_together("reset_anchor")
            if self._worker is not None:
                self._worker.flush()
            self._averaging.reset_anchor(self.progress)
            if self._worker is not None:
                self._worker.reset_centre()

    def serve(self) -> Iterator[Arrival]:
        """On a server, serve until every learner has called `finish`, yielding every update; elsewhere yield nothing.

        `finish` serves, too; this is for who wants to see the updates come in.
        """
        if self._server is not None:
            yield from self._server.serve()

    @contextmanager
    def mean_model(self, batches: Iterable[Any] | None = None) -> Iterator[torch.nn.Module]:
        """Let the model hold the mean over all learners inside the block; afterwards it is what it was, bit for bit.

        Of an asynchronous run it is the centre. Collective over all learners. Needs room for one more copy of the
        parameters. It is no part of the algorithm: it appears neither in `events` nor in `totals`.
        """
        averaging, replica, progress = self._averaging, self._replica, self.progress
        self._check_together("mean_model")
        averaging.look_whether_agreed(Kind.MEAN_MODEL, progress)
        saved, was_lent = replica.snapshot(), self._is_lent
        self._is_lent = True
        try:
            if not averaging.learners_agree:
                buffers = [replica.buffers] if self._buffer_policy == "average" else []
                if self._worker is not None:
                    self._worker.look()
                else:
                    buffers = [replica.parameters, *buffers]
                averaging.replace_by_mean(Kind.MEAN_MODEL, progress, *buffers)
            if self._buffer_policy == "recompute" and batches is not None:
                self.recompute_buffers(batches)
            yield self.model
        finally:
            self._is_lent = was_lent
            replica.restore(saved)
            self.restart_clock()

    def model_state_dict(self) -> dict[str, Any]:
        """Return a copy of the model's state in which every tensor, tied or not, is contiguous in memory of its own.

        For formats that refuse shared memory, such as safetensors. ``model.state_dict()`` will do for ``torch.save``.
        """
        return self._replica.state_dict()

    def recompute_buffers(self, batches: Iterable[Any]) -> None:
        """Re-estimate the BatchNorm statistics of the model as it is on `batches`, then average them over all learners.

        batches : inputs, or sequences whose first element is the input, of this learner's training data.
        """
        with torch.no_grad():
            torch.optim.swa_utils.update_bn(batches, self.model)
            self._averaging.replace_by_mean(Kind.RECOMPUTE_BUFFERS, self.progress, self._replica.buffers)

    def restart_clock(self) -> None:
        """Let the round's clock start now: what the caller did since the mean is not the learner's time to step."""
        self._rounds.restart_clock()

    def _follow_start(self) -> None:
        """Let anchors and servers start from the parameters as they are before the first step.

        Collective over the learners of an asynchronous rule where they have loaded weights: none may fetch the centre
        before it is there.
        """
        if self._worker is None:
            self._averaging.follow_start()
        elif self._worker.has_other_parameters():
            self._averaging.meet_alike(Kind.FIRST_STEP, self.progress)
            self._worker.reset_centre()

    # -- what rules follow ----------------------------------------------------------------------------------------

    def _check_together(self, what: str) -> None:
        """Raise `InputError` where this learner is alone: the others' next mean would meet something else."""
        if self.agreed_step is None:
            allowed = "at a global mean, where averager.agreed_step is a number: learners go at their own pace"
            raise InputError(what, f"called at step {self.progress.step}", allowed)

    def _check_kept(self, what: str) -> None:
        """Raise `InputError` in the block of `mean_model`, after which the parameters are the former ones again."""
        if self._is_lent:
            raise InputError(what, f"called at step {self.progress.step}", "outside the block of averager.mean_model()")

    def _record(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)
            self.totals.add(event)

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the states of model and optimizer, as plain values and tensors.

        A mean in flight is waited for, kept, and merged when it is due. Asynchronous algorithms keep their state on
        servers and in messages, and they are refused.
        """
        self._check_resumable()
        return {
            "algorithm": self.algorithm.name,
            "options": dict(self.algorithm.options),
            "progress": asdict(self.progress),
            "totals": asdict(self.totals),
            "generator": self.generator.get_state(),
            **self._rounds.state_dict(),
            "averaging": self._averaging.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; raises `InputError` where it belongs to another rule."""
        self._check_resumable()
        given = (state["algorithm"], state["options"])
        if given != (self.algorithm.name, dict(self.algorithm.options)):
            raise InputError("state", given, f"that of {self.algorithm.name} with {self.algorithm.options}")
        self.progress = Progress(**state["progress"])
        self.totals = Totals(**state["totals"])
        self.generator.set_state(state["generator"])
        self._averaging.load_state_dict(state["averaging"])
        self._rounds.load_state_dict(state, self.progress)

    def _check_resumable(self) -> None:
        if self.algorithm.server is not None:
            raise InputError(
                "algorithm", self.algorithm.name, "one without servers, whose state is not on this rank alone"
            )
