"""The averager: model averaging around a training loop's optimizer."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run
from hpcavg.algorithms.scope import GLOBAL, SERVER
from hpcavg.averaging.calls import Caller, Kind
from hpcavg.averaging.checks import check_alike, check_rule, check_step, check_wire, timeout_s
from hpcavg.averaging.delayed import DelayedAveraging
from hpcavg.averaging.events import Arrival, Event, Totals
from hpcavg.averaging.exchanges import Exchanges
from hpcavg.averaging.learner_means import LearnerMeans
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.averaging.paces import Paces
from hpcavg.averaging.parameter_server import Worker
from hpcavg.averaging.replica import Replica
from hpcavg.averaging.rounds import Rounds
from hpcavg.averaging.server import Server
from hpcavg.averaging.simulated_servers import SimulatedServers
from hpcavg.averaging.stacked import Stacked
from hpcavg.averaging.stacked_optimizer import StackedOptimizer
from hpcavg.averaging.synchronous import Averaging
from hpcavg.config.sections.averaging import AveragingOptions
from hpcavg.distributed.topology import Topology
from hpcavg.distributed.watchdog import watch_over
from hpcavg.engines.compression import wire_format
from hpcavg.engines.crossing import Crossing
from hpcavg.engines.select import CPU, select_engine
from hpcavg.errors import InputError


class Averager:
    """Model averaging for a training loop: call `step` instead of ``optimizer.step``.

    The parameters that require a gradient become views of one flat buffer per dtype. Every learner starts from rank 0's
    parameters and buffers. Frozen parameters stay as they are; unfreezing one later is an error.

    Parameters
    ----------
    model : any module, the same on every rank. Wrappers that synchronise or shard a model, such as
        DistributedDataParallel and FSDP, are refused. For several learners in a rank: what `hpcavg.stack` returns.
    optimizer : any torch optimizer over the model's parameters, the same on every rank.
    algorithm : a rule from `hpcavg.algorithms`.
    topology : the learners, and the servers of an asynchronous algorithm. Servers are simulated if one rank holds all
        learners, several of them, and `Topology.num_servers` is 0. None: ``Topology()``, with as many learners
        in a rank as the model has.
    options : the options; see `hpcavg.AveragingOptions`. None: the defaults.
    **changes : fields of `hpcavg.AveragingOptions` that replace those of `options`, such as ``buffers="keep"``.

    Attributes
    ----------
    model : the model.
    optimizer : the optimizer.
    algorithm : the rule.
    topology : the learners and servers.
    engine : takes the means.
    events : the latest means and exchanges, oldest first, as `Event`. The caller may clear it.
    totals : the sums over all events, as `Totals`.
    generators : a ``torch.Generator`` for each learner of this rank; see `AveragingOptions.seed`.
    supervisor : the thread that watches this rank; `hpcavg.distributed.preemption` takes it.

    Raises
    ------
    InputError
        On every rank: a value that cannot be used, options that exclude each other, or models, rules or options that
        differ between ranks.
    TypeError
        An unknown option.
    MismatchError
        From every collective method, on all learners, if they meet in different calls: one took fewer steps, or called
        `mean_model` alone.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import Averager, Topology, algorithms
    >>> model = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> topology = Topology()
    >>> averager = Averager(model, optimizer, algorithms.k_avg(k=2), topology, buffers="keep")
    >>> for _ in range(4):
    ...     optimizer.zero_grad()
    ...     model(torch.ones(8, 2)).mean().backward()
    ...     averager.step()
    >>> averager.finish()
    >>> [(event.step, event.scope.name) for event in averager.events]
    [(2, 'global'), (4, 'global')]

    In the block of `mean_model`, the model holds the mean of all learners:

    >>> with averager.mean_model() as mean:
    ...     mean is model
    True

    A checkpoint needs the states of model, optimizer and averager. To resume, restore the model first:

    >>> state = averager.state_dict()
    >>> again = Averager(model, optimizer, algorithms.k_avg(k=2), topology, start="own")
    >>> again.load_state_dict(state)
    >>> again.progress.step
    4
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
        learners = model.learners if isinstance(model, Stacked) else 1
        topology = topology or Topology(learners_per_rank=learners)
        options = topology.run_on_all_ranks(partial(_changed, options, **changes))
        topology.run_on_all_ranks(partial(check_rule, algorithm, options, topology, learners))
        number = topology.num_averagers
        check_alike(topology, algorithm, options, type(optimizer).__name__, number)
        topology.num_averagers += 1
        self.supervisor = watch_over(topology, timeout_s(options)).supervisor
        self.model, self.optimizer = model, optimizer
        self.algorithm = algorithm
        self.topology = topology
        self.events: deque[Event] = deque(maxlen=2**16)
        self.totals = Totals()
        # An odd factor gives every learner its own seed; a large one keeps the seeds of neighbouring runs apart.
        first_seed = options.seed * 1_000_003
        first = topology.learners.start
        self.generators = [
            torch.Generator().manual_seed((first_seed + each) % 2**63) for each in range(first, first + learners)
        ]
        self._run = run = Run(topology.num_learners, topology.learners.start, options.total_steps, options.batch_size)
        simulates = algorithm.server is not None and not topology.num_servers
        self._paces = Paces(algorithm, run, learners, algorithm.own_pace or simulates)
        self._buffer_policy = options.buffers
        self._has_finished = False
        self._holds_mean = False  # inside the block of mean_model
        self._worker: Exchanges | None = None
        self._server: Server | None = None
        devices = (parameter.device for group in optimizer.param_groups for parameter in group["params"])
        with topology.waiting("set-up of the averager", SERVER):
            form = wire_format(options.wire_dtype, options.error_feedback)
            takes_means = algorithm.server is None
            device = next(devices, CPU)
            self.engine = select_engine(options.engine, topology, device, form, options.crossing, takes_means)
            check_wire(algorithm, self.engine, topology, options)
            self._set_up_optimizer()
            self._rounds = Rounds(algorithm, run, self._paces, topology, optimizer)
            self._replica = replica = Replica(model, optimizer, topology, self.engine, options.start)
            own_pace = algorithm.own_pace or options.step_times != "constant"
            self._optimizer = (
                StackedOptimizer(optimizer, learners, own_pace)
                if isinstance(model, Stacked)
                else LocalOptimizer(optimizer)
            )
            self._learner = learner = LearnerMeans(algorithm, self.engine, topology, self._optimizer, replica, options)
            self._averaging = Averaging(learner, Caller(algorithm, topology, number))
            self._delayed = DelayedAveraging(learner) if algorithm.delay_steps else None
            if topology.is_server:
                self._server = Server(replica.parameters, topology)
            elif algorithm.server is not None:
                kind = SimulatedServers if simulates else Worker
                self._worker = kind(algorithm.server, replica, self._optimizer, self._paces, topology, options)

    def _set_up_optimizer(self) -> None:
        """Set the options of the optimizer that the rule requires, such as its momentum."""
        for group in self.optimizer.param_groups:
            for name, value in self.algorithm.optimizer.items():
                if name not in group:
                    kind = type(self.optimizer).__name__
                    raise InputError(
                        "optimizer", kind, f"torch.optim.SGD, which has the {name} of {self.algorithm.name}"
                    )
                group[name] = value

    # -- progress -------------------------------------------------------------------------------------------------

    @property
    def progress(self) -> Progress:
        """The progress of this rank's first learner; ``progress.step`` is the number of steps that it has taken."""
        return self._paces[0].progress

    @property
    def generator(self) -> torch.Generator:
        """The generator of this rank's first learner."""
        return self.generators[0]

    @property
    def progress_of(self) -> list[Progress]:
        """The progress of each learner of this rank. Learners that take the same steps share it."""
        return self._paces.progress_of

    @property
    def active(self) -> list[int]:
        """The rows of this rank's learners that take the next step.

        The others wait for a mean, or their last step ends later in simulated time.
        """
        return self._paces.active

    @property
    def agreed_step(self) -> float | None:
        """The number of steps that all learners have taken; None if they may differ in it.

        Rules that let learners take different numbers of steps have an agreed step only at a global mean: the mean of
        these numbers. Collective work must wait for it. In an asynchronous run it is the number of this rank's learner,
        or the smallest if there are several.
        """
        progress = self.progress
        if self._worker is not None:
            return min(each.step for each in self.progress_of)
        if not self.algorithm.own_pace or self.topology.num_learners == 1:
            return progress.step
        is_at_mean = all(each.step == each.round_step for each in self.progress_of)
        return progress.mean_step if is_at_mean else None

    @property
    def done(self) -> bool:
        """Whether all learners have taken `total_steps`; always True on a server."""
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
        """Take the optimizer's step, and the mean or exchange that is due. Collective if a mean is due.

        Parameters
        ----------
        loss : the step's training loss; of several learners in a rank, a tensor of shape (learners,). Only rules whose
            period follows the loss need it.
        scaler : an AMP gradient scaler: ``scaler.step`` replaces ``optimizer.step``; the caller calls
            ``scaler.update``. A step that the scaler skips counts as a step, which keeps the learners together.
        closure : passed to ``optimizer.step``, for optimizers that need one. Refused if the rule averages before the
            step, whose gradients the closure would compute after the mean, or if the rank has several learners.

        Raises
        ------
        InputError
            If an argument cannot be used, or the call is on a server, in the block of `mean_model`, or, for an
            asynchronous rule, after `finish`.
        SickLearnersError
            On all learners of the mean, if learners with parameters that are not finite stop the run.
        CorruptionError
            On all learners, if a comparison (`AveragingOptions.check_rounds`) finds a difference.
        """
        check_step(self.algorithm, self.topology, loss, closure is not None, scaler is not None)
        self._check_outside_block("step")
        if self._worker is not None and self._worker.is_finished:
            raise InputError("step", self.progress.step + 1, "taken before finish: the servers have left")
        rule, progress, averaging = self.algorithm, self.progress, self._averaging
        if progress.step == 0:
            self._follow_start()
        rows = self._paces.active
        if not rows:
            raise InputError("step", progress.step + 1, f"at most total_steps, {self._run.total_steps}")
        self._paces.begin_step()
        self._rounds.begin_step(loss)
        due = self._paces.due()
        told = self._rounds.report() if due is GLOBAL else None
        if due is not None and rule.before_step:
            self._record(averaging.take(due, progress, told))
        self._optimizer.step(rows, scaler, closure)
        self._learner.learners_agree = False
        if self._delayed is not None and self._delayed.merge_step == progress.step:
            self._record(self._delayed.merge(progress))
        if self._delayed is not None and due is GLOBAL:
            self._delayed.start(progress)
        elif due is not None and not rule.before_step:
            self._record(averaging.take(due, progress, told))
        if due is GLOBAL:
            self._rounds.end(None if self._delayed is not None else averaging.told)
        for event in [] if self._worker is None else self._worker.exchange():
            self._record(event)
        self._let_wait()
        self.supervisor.begin_step(progress.step + 1)
        self._learner.equality.raise_alarm()

    def _let_wait(self) -> None:
        """Tell the model which learners take the next step."""
        if isinstance(self.model, Stacked) and len(self._paces) > 1:
            self.model.active = self.active

    def finish(self, batches: Iterable[Any] | None = None) -> None:
        """Merge the mean in flight and take the final global mean: every learner then holds the run's model.

        Collective over all ranks. A server serves until all learners have called it. If the last step took a global
        mean, no other is taken. The model of an asynchronous run is the centre.

        Parameters
        ----------
        batches : training inputs for `recompute_buffers`. Needed if `buffers` is ``"recompute"``.

        Raises
        ------
        InputError
            If `batches` is needed and missing, or the learners are not at an `agreed_step`.
        """
        averaging, learner, progress = self._averaging, self._learner, self.progress
        self._check_outside_block("finish")
        self._check_agreed_step("finish")
        has_finished = self._has_finished
        self._has_finished = True
        if self._server is not None:
            for _ in self.serve():
                pass
            self._server.finish()
            if not has_finished:
                self._replica.share_buffers()
            return
        for event in [] if self._worker is None else self._worker.say_goodbye():
            self._record(event)
        averaging.update_learners_agree(Kind.FINISH, progress)
        if self._delayed is not None and self._delayed.merge_step is not None:
            self._record(self._delayed.merge(progress))
        if self._worker is not None:
            self._worker.finish()
            if self._buffer_policy == "average":
                averaging.replace_by_mean(Kind.FINISH, progress, self._replica.buffers)
        elif not learner.learners_agree:
            self._record(averaging.take_final(progress))
        learner.learners_agree = True
        learner.equality.raise_alarm()
        if self._buffer_policy == "recompute":
            if batches is None:
                raise InputError("batches", None, "training batches, because buffers='recompute'")
            self.recompute_buffers(batches)
        if self._worker is not None and not has_finished:
            self._replica.share_buffers()

    def serve(self) -> Iterator[Arrival]:
        """On a server, serve until every learner has called `finish`, and yield every update. Elsewhere, yield nothing.

        `finish` serves, too. Call `serve` before it to see the updates. Where servers are simulated, it yields the
        updates since the last call, also after `finish`; the latest 65536 are kept.
        """
        if self._server is not None:
            yield from self._server.serve()
        elif isinstance(self._worker, SimulatedServers):
            yield from self._worker.arrivals()

    def check_health(self, what: str) -> None:
        """Raise `SickLearnersError` on all learners if they could take no global mean now. Collective over them.

        `AveragingOptions.non_finite` counts as at a mean.

        Parameters
        ----------
        what : what needs healthy learners, for the message; such as ``"checkpoint"``.
        """
        self._check_agreed_step("check_health")
        self._averaging.check_health(self.progress, what)

    def reset_anchor(self) -> None:
        """Continue from the current parameters. Call it after loading weights on all ranks in the middle of a run.

        It drops what was kept of the former parameters: the anchor and momentum of SlowMo and DiLoCo, a mean in flight,
        and the centre on the servers. Before the first step it is not needed. Collective over all learners; a server
        returns at once.

        Raises
        ------
        InputError
            On all learners, if their parameters differ.
        """
        if self._server is None:
            self._check_outside_block("reset_anchor")
            self._check_agreed_step("reset_anchor")
            if self._worker is not None:
                self._worker.flush()
            self._averaging.require_equal_parameters(Kind.RESET_ANCHOR, self.progress)
            if self._delayed is not None:
                self._delayed.drop()
            self._averaging.follow_start()
            if self._worker is not None:
                self._worker.reset_centre()

    def restart_clock(self) -> None:
        """Restart the clock of the round: the time since the last mean does not count as this learner's steps."""
        self._rounds.restart_clock()

    def _follow_start(self) -> None:
        """Let anchors and servers start from the parameters before the first step.

        Collective over the learners of an asynchronous rule if they loaded weights: no learner may fetch the centre
        before it is set.
        """
        if self._worker is None:
            self._averaging.follow_start()
        elif self._worker.has_other_parameters():
            self._averaging.require_equal_parameters(Kind.FIRST_STEP, self.progress)
            self._worker.reset_centre()

    def _check_agreed_step(self, what: str) -> None:
        """Raise `InputError` if learners may be at different steps: the call would meet a mean of the others."""
        if self.agreed_step is None:
            allowed = "at a global mean, where averager.agreed_step is a number: learners go at their own pace"
            raise InputError(what, f"called at step {self.progress.step}", allowed)

    def _check_outside_block(self, what: str) -> None:
        """Raise `InputError` in the block of `mean_model`: the end of the block would undo the call."""
        if self._holds_mean:
            raise InputError(what, f"called at step {self.progress.step}", "outside the block of averager.mean_model()")

    def _record(self, event: Event | None) -> None:
        if event is not None:
            self.events.append(event)
            self.totals.add(event)

    # -- the mean model -------------------------------------------------------------------------------------------

    @contextmanager
    def mean_model(self, batches: Iterable[Any] | None = None) -> Iterator[torch.nn.Module]:
        """Let the model hold the mean of all learners in a ``with`` block; then restore it bit for bit.

        In an asynchronous run the mean is the centre. Collective over all learners. It takes memory for one more copy
        of the parameters. It is no part of the algorithm: `events` and `totals` do not count it.

        Parameters
        ----------
        batches : training inputs for `recompute_buffers`, used if `buffers` is ``"recompute"``.

        Yields
        ------
        torch.nn.Module
            The model.
        """
        averaging, replica, progress = self._averaging, self._replica, self.progress
        self._check_agreed_step("mean_model")
        averaging.update_learners_agree(Kind.MEAN_MODEL, progress)
        saved, held_mean = replica.snapshot(), self._holds_mean
        self._holds_mean = True
        try:
            if not self._learner.learners_agree:
                buffers = [replica.buffers] if self._buffer_policy == "average" else []
                if self._worker is not None:
                    self._worker.show_centre()
                else:
                    buffers = [replica.parameters, *buffers]
                averaging.replace_by_mean(Kind.MEAN_MODEL, progress, *buffers)
            if self._buffer_policy == "recompute" and batches is not None:
                self.recompute_buffers(batches)
            yield self.model
        finally:
            self._holds_mean = held_mean
            replica.restore(saved)
            self.restart_clock()

    def recompute_buffers(self, batches: Iterable[Any]) -> None:
        """Compute the BatchNorm statistics of the current model anew, and average them. Collective over all learners.

        Parameters
        ----------
        batches : this learner's training inputs, or sequences whose first element is the input.
        """
        model = self.model
        with torch.no_grad(), model.one_by_one() if isinstance(model, Stacked) else nullcontext():
            torch.optim.swa_utils.update_bn(batches, model)
            self._averaging.replace_by_mean(Kind.RECOMPUTE_BUFFERS, self.progress, self._replica.buffers)

    def model_state_dict(self) -> dict[str, Any]:
        """Return a copy of the model's state whose tensors are contiguous and share no memory, even if tied.

        For formats that refuse shared memory, such as safetensors. ``torch.save`` takes ``model.state_dict()``. Of
        several learners in a rank, it is the first one's model, which needs no `stack`.
        """
        return self._replica.state_dict()

    # -- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides model and optimizer, as plain values and tensors.

        It waits for a mean in flight and includes it; the mean is merged when it is due.

        Raises
        ------
        InputError
            For an asynchronous rule: servers and messages hold a part of its state.
        """
        self._check_resumable()
        of_learners = [self.state_dict_of(row) for row in range(self.topology.learners_per_rank)]
        if not isinstance(self.model, Stacked):
            return of_learners[0]
        optimizers = [self.optimizer_state_of(row) for row in range(len(of_learners))]
        return {"learners": of_learners, "optimizers": optimizers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned, after model and optimizer were restored.

        Raises
        ------
        InputError
            If the state is of another rule, or the rule is asynchronous.
        """
        if isinstance(self.model, Stacked):
            self.load_optimizer_states(state["optimizers"])
        self.load_state_dicts(state["learners"] if isinstance(self.model, Stacked) else [state])

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return the `state_dict` that a learner of this rank has on a rank of its own."""
        self._check_resumable()
        return {
            "algorithm": self.algorithm.name,
            "options": dict(self.algorithm.options),
            "progress": asdict(self.progress_of[row]),
            "totals": asdict(self.totals),
            "generator": self.generators[row].get_state(),
            **self._rounds.state_dict_of(row),
            "averaging": {
                **self._learner.state_dict_of(row),
                "in_flight": None if self._delayed is None else self._delayed.state_dict_of(row),
            },
            "crossings": {name: str(crossing) for name, crossing in self.engine.crossings.items()},
        }

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state_dict_of` returned for each learner of this rank.

        Raises
        ------
        InputError
            If a state is of another rule, or the rule is asynchronous.
        """
        self._check_resumable()
        wanted = (self.algorithm.name, dict(self.algorithm.options))
        for state in states:
            given = (state["algorithm"], state["options"])
            if given != wanted:
                raise InputError("state", given, f"that of {self.algorithm.name} with {self.algorithm.options}")
        for pace in self._paces:
            pace.progress = Progress(**states[pace.rows.start]["progress"])
        self.totals = Totals(**states[0]["totals"])
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state["generator"])
        self._learner.load_state_dicts([state["averaging"] for state in states])
        if self._delayed is not None:
            self._delayed.load_state_dicts([state["averaging"]["in_flight"] for state in states])
        self._rounds.load_state_dicts(states)
        crossings = states[0].get("crossings", {})  # earlier forms have none
        self.engine.use_crossings({name: Crossing.parse(text) for name, text in crossings.items()})

    def optimizer_state_of(self, row: int) -> dict[str, Any]:
        """Return the ``state_dict`` that the optimizer of a learner of this rank has on a rank of its own."""
        return self._optimizer.state_dict_of(row)

    def load_optimizer_states(self, states: Sequence[dict[str, Any]]) -> None:
        """Give the optimizer of each learner of this rank the state that `optimizer_state_of` returned."""
        self._optimizer.load_state_dicts(states)

    def restart_at(self, step: int, of_before: Mapping[str, Any]) -> None:
        """Count on from `step`, in the round after that of `of_before`, with all else new.

        Parameters
        ----------
        step : the steps that every learner counts as taken.
        of_before : fields of a learner's `Progress`, of a run with another number of learners.
        """
        kept = {name: of_before[name] for name in ("round", "first_loss", "loss")}
        for pace in self._paces:
            pace.progress = Progress(step=step, round_step=step, mean_step=float(step), **kept)

    def _check_resumable(self) -> None:
        if self.algorithm.server is not None:
            raise InputError(
                "algorithm", self.algorithm.name, "one without servers, whose state is not on this rank alone"
            )


def _changed(options: AveragingOptions | None, **changes: Any) -> AveragingOptions:
    """Return `options`, or the defaults, with `changes`."""
    if not isinstance(options, AveragingOptions | None):
        raise InputError("options", options, "an AveragingOptions, or its fields by keyword, as engine='shared'")
    return replace(options or AveragingOptions(), **changes)
