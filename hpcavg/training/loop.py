"""The training loop of one rank: steps, evaluations and checkpoints, to the end or until somebody asks for a stop."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from hpcavg.checkpoints.manager import CheckpointManager
from hpcavg.distributed.preemption import PauseKind, Pauses
from hpcavg.errors import CorruptionError
from hpcavg.tasks import Task
from hpcavg.training import failures
from hpcavg.training.evaluation import Evaluation, Score, evaluate
from hpcavg.training.loop_state import LoopState
from hpcavg.training.run_recorder import RunRecorder


class Loop:
    """Trains the rank's learners, or serves parameters.

    Parameters
    ----------
    task : Task
        What is learned.
    state : LoopState
        What the learners train with, and how far they have come.
    recorder : RunRecorder
        Records and shows the run.
    checkpoints : CheckpointManager
        Writes the checkpoints.
    pauses : Pauses
        Collects requests for checkpoints and stops.

    Attributes
    ----------
    stopped_by : str or None
        Who asked for the stop; None if the run is to go on.
    """

    def __init__(
        self, task: Task, state: LoopState, recorder: RunRecorder, checkpoints: CheckpointManager, pauses: Pauses
    ) -> None:
        self.stopped_by: str | None = None
        self._task, self._state, self._recorder = task, state, recorder
        self._checkpoints, self._pauses = checkpoints, pauses
        self._averager = state.averager
        self._topology, self._model = self._averager.topology, self._averager.model
        # If learners wait for others of this rank, more than any of them takes.
        self._steps_here = self._averager.progress.step

    def run(self) -> Evaluation | None:
        """Train to the end and return the last evaluation; None after a stop with a checkpoint. Collective.

        Evaluations, checkpoints and the end come at steps that all learners are known to have reached.
        """
        averager, is_asynchronous = self._averager, self._averager.algorithm.server is not None
        is_by_step = not averager.algorithm.own_pace
        self._model.train()
        self._end_epoch_if_due(averager.agreed_step)  # whose checkpoint was written before
        while not averager.done and self.stopped_by is None:
            self._train_step()
            self._recorder.advance(averager.progress.step)
            if self._checkpoints.is_overdue and self._pauses.requested is PauseKind.NOTHING:
                self._pauses.request(PauseKind.CHECKPOINT, "the clock")
            self._steps_here += 1
            pause = self._pauses.end_step(self._steps_here)
            reached = averager.agreed_step
            if reached is None:
                continue
            if not is_by_step:
                pause = self._pauses.agree_now()
            # Asynchronous learners follow their own steps; those of a rank have one rate, of their mean step.
            self._state.follow_schedule(sum(self._steps) / len(self._steps) if is_asynchronous else reached)
            if averager.done:
                break
            if pause is not None and pause.kind is PauseKind.STOP:
                self.stopped_by = pause.reason
            if not is_asynchronous and (pause is not None or self._checkpoints.is_due(reached)):
                self._save(reached)
            if self.stopped_by is None:  # a run that goes on from the checkpoint evaluates before its first step
                self._end_epoch_if_due(reached)
        if is_asynchronous:
            return self._end_epoch(averager.agreed_step or 0.0)
        if self.stopped_by is not None:
            return None
        self._save(averager.agreed_step or 0.0)
        return self._end_epoch(averager.agreed_step or 0.0)

    def serve(self) -> None:
        """Serve parameters until every learner is done; record the updates as they arrive."""
        self._recorder.arrivals(self._averager.serve(), by_learner=False)
        self._averager.finish()

    # -- steps ----------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        """Take one step and record it."""
        state, averager = self._state, self._averager
        totals, passes, optimizer = state.totals, state.passes, averager.optimizer
        before = time.perf_counter()
        rows, num_learners = averager.active, len(state.learners)
        epochs, inputs, targets = state.loader.next(rows)
        ready = time.perf_counter()
        optimizer.zero_grad()
        loss = passes.gradients(inputs, targets)
        try:
            averager.step(loss, scaler=passes.scaler)
        except CorruptionError as error:
            failures.leave_if_corrupt(error, self._topology)
        passes.end_step()
        averaging_s = self._recorder.averages(averager)
        after = time.perf_counter()
        data_s, compute_s = ready - before, after - ready - averaging_s
        loss, rate = loss.detach(), optimizer.param_groups[0]["lr"]
        times = compute_s, data_s, averaging_s
        if num_learners == 1:
            self._recorder.add("step", averager.progress.step, epochs[0] + 1, loss, rate, *times)
        else:
            epochs = [epoch + 1 for epoch in epochs]
            self._recorder.add("step", self._steps, epochs, loss, rate, *times, of=rows)
            self._recorder.arrivals(averager.serve(), by_learner=True)
        totals.compute_s += compute_s
        totals.data_s += data_s
        losses, size = (loss.unbind(), inputs.shape[1]) if num_learners > 1 else ([loss], inputs.shape[0])
        for row in rows:
            totals.samples[row] += size
            state.losses[row].append(losses[row])

    @property
    def _steps(self) -> list[int]:
        """The steps that each learner of this rank has taken."""
        return [progress.step for progress in self._averager.progress_of]

    # -- evaluations and checkpoints ------------------------------------------------------------------------------

    def _end_epoch_if_due(self, reached: float | None) -> None:
        """End the epoch if all learners have taken its steps. That of the last step ends with the run."""
        state = self._state
        is_over = reached is not None and reached >= (state.epoch + 1) * state.loader.steps_per_epoch
        if reached is not None and is_over and not self._averager.done:
            self._end_epoch(reached)

    def _end_epoch(self, reached: float) -> Evaluation:
        """Evaluate, record and show; after the last step, take the final mean first. Collective over all learners."""
        state, averager, topology, before = self._state, self._averager, self._topology, time.perf_counter()
        state.epoch = epoch = max(state.epoch + 1, int(reached // state.loader.steps_per_epoch))
        what = f"evaluation after step {reached:g}"
        learners = self._evaluate(what)
        inputs = state.loader.train_inputs(epoch) if state.config.averaging.buffers == "recompute" else None
        if averager.done or self.stopped_by is not None:
            averager.finish(inputs)
            self._recorder.arrivals(averager.serve(), by_learner=True)
            mean = self._evaluate(what)
        else:
            with averager.mean_model(inputs):
                mean = self._evaluate(what)
        own = [float(torch.stack(losses).double().mean()) if losses else None for losses in state.losses]
        state.losses = [[] for _ in own]
        losses = topology.run_collective(lambda: [*chain(*topology.learner_ranks.allgather(own))], what=what)
        known = [loss for loss in losses if loss is not None]  # others of this rank may have taken all their steps
        train_loss = sum(known) / len(known) if known else math.nan
        blocked_s = self._recorder.averages(averager)  # of the final mean, if any
        result = Evaluation(averager.progress.step, epoch, train_loss, mean, learners)
        self._recorder.evaluation(result, self._task.count_correct is not None, self._steps)
        self._recorder.flush()
        self._model.train()
        state.totals.evaluation_s += time.perf_counter() - before - blocked_s
        averager.restart_clock()
        return result

    def _evaluate(self, what: str) -> Score:
        self._model.eval()
        return evaluate(self._outputs, self._task, self._topology, what)

    def _outputs(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs and targets of the test samples of this rank's learners, by the model of each."""
        passes, loader = self._state.passes, self._state.loader
        if len(self._state.learners) == 1:
            for inputs, targets in loader.test_batches():
                yield passes.predict(inputs), targets
        else:
            for rows, inputs, targets in loader.test_batches_of_learners():
                yield passes.predict_of(rows, inputs).flatten(0, 1), targets.flatten(0, 1)

    def _save(self, reached: float) -> None:
        """Write a checkpoint of all learners, which have reached this step; report one that cannot be written."""
        state, recorder, before = self._state, self._recorder, time.perf_counter()
        self._averager.check_health("checkpoint")  # the last good one must be one to go on from
        recorder.flush()

        def about() -> dict[str, Any]:
            own = [recorder.positions(row) for row in range(len(state.learners))]
            return state.about([*chain(*(self._topology.learner_ranks.gather(own) or ()))])

        self._checkpoints.write(reached, state.parts, about)
        if self._checkpoints.failure is not None:
            recorder.report_loss("checkpoint", f"checkpoint of step {round(reached)} ({self._checkpoints.failure})")
        recorder.report_remains(self._checkpoints.remains)
        state.totals.checkpoint_s += time.perf_counter() - before
