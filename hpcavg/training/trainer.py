"""The training run: set up together, loop, evaluate the mean model, leave a record."""

from __future__ import annotations

import math
import os
import time
import uuid
from dataclasses import asdict, astuple
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg import tasks
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.averager import Averager
from hpcavg.checkpoints import collective, resume
from hpcavg.checkpoints.manager import Checkpointer
from hpcavg.checkpoints.store import Checkpoint, save_model
from hpcavg.config.options import CHECKPOINTS, Config
from hpcavg.distributed.job_environment import early_signals
from hpcavg.distributed.preemption import Kind, Pauses, deadline
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.distributed.watchdog import watch_over
from hpcavg.errors import CorruptionError, SickLearnersError
from hpcavg.machine import placement
from hpcavg.machine.survey import look_around
from hpcavg.results import run_folder
from hpcavg.results.metrics import begin_segment, file_name, rows_before
from hpcavg.results.run_lock import RunLock, this_process
from hpcavg.results.summary import Summary, show
from hpcavg.training import eager, failures, optimizers, trial
from hpcavg.training.evaluation import Score, evaluate
from hpcavg.training.failures import FAILED, RECORDS_LOST, REQUEUE
from hpcavg.training.forward_backward import ModelPasses
from hpcavg.training.loader import Feed
from hpcavg.training.run_recorder import Record, attributes
from hpcavg.training.run_totals import Account, Result, summarise


class Trainer:
    """One rank of a training run: everything the loop needs, set up in agreement with the other ranks.

    Raises `InputError` on every rank when any rank finds the configuration, the task, its data or the checkpoint to go
    on from unusable; nothing has been written then.
    """

    def __init__(self, config: Config) -> None:
        eager.defer_compiler_import()
        wait_asleep(MPI.COMM_WORLD)
        self.config = config
        self.topology = topology = failures.build_topology(config)
        run = topology.all_ranks.bcast(uuid.uuid4().hex)
        self.lock = RunLock(this_process(run, has_heirs=topology.survives), failures.give_up)
        with self.lock:
            self._set_up()

    def _set_up(self) -> None:
        config, topology = self.config, self.topology
        self.device = topology.run_on_all_ranks(lambda: placement.choose_device(config.device, topology.node_rank))
        self.threads = config.threads or placement.num_threads(topology.node)
        torch.set_num_threads(self.threads)
        now = time.monotonic(), time.time(), placement.process_age_s()
        limits = config.stop_after, config.stop_margin
        self._stop_at = topology.run_on_all_ranks(lambda: deadline(*now, *limits, os.environ))
        self.task = topology.run_on_all_ranks(lambda: tasks.load(config))
        self.feed = Feed(self.task, config, topology, self.device)
        self.total_steps = config.steps or (config.epochs or 0) * self.feed.steps_per_epoch
        self._found = topology.run_on_first_rank(self._find)
        collective.seed_generators(config.seed)
        model = topology.run_on_all_ranks(lambda: tasks.build_model(self.task))
        self.model = model.to(self.device, getattr(torch, config.dtype))
        self.optimizer = optimizers.build_optimizer(config, self.model.parameters())
        self.passes = topology.run_on_all_ranks(lambda: ModelPasses(config, self.task, self.model, self.optimizer))
        topology.run_on_all_ranks(
            lambda: None if topology.is_server else trial.check(config, self.task, self.passes, self.feed)
        )
        saved = self._found.checkpoint
        if saved is not None and not self._is_of_as_many(saved):  # the averager gives everyone rank 0's
            fill = partial(collective.load_mean_model, self.model)
            topology.run_on_all_ranks(lambda: saved.understand(fill) if topology.rank == 0 else None)
        watch_over(topology, config.hang_timeout, lambda: failures.abort(config))
        with topology.waiting("start", SERVER):
            self.averager = Averager(
                self.model,
                self.optimizer,
                config.rule(),
                topology,
                engine=config.engine,
                buffers=config.buffers,
                optimizer_state=config.optimizer_state,
                seed=config.seed,
                total_steps=self.total_steps,
                batch_size=config.batch_size,
                measure_distance=config.consensus_distance,
                wire_dtype=config.wire_dtype,
                error_feedback=config.error_feedback,
                non_finite=config.non_finite,
                check_rounds=config.check_rounds,
                hang_timeout=config.hang_timeout,
            )
        if config.compile:
            self.passes.compile(self.feed.peek, topology)
        # From here on learners differ: dropout and other random layers draw from the learner's own stream.
        collective.seed_generators(self.averager.generator.initial_seed())
        self.scheduler = optimizers.build_scheduler(config, self.optimizer, self.total_steps, self.feed.steps_per_epoch)
        self.account = Account()
        self.epoch = 0  # those that are over
        self._losses: list[Tensor] = []  # since then
        if saved is not None:
            topology.run_on_all_ranks(lambda: saved.understand(self._go_on_from))
        self.path, self._segments = self._create_folder()
        topology.on_shrink(lambda: None if topology.rank else self.lock.inherit(self.path))

    def train(self) -> int:
        """Train to the end, or until a signal or the time limit, and leave the run's record in `path`. Collective.

        Returns the exit status of all ranks: 0; `RECORDS_LOST` where all went well but for the record of it; `REQUEUE`
        where the run stopped early and left a checkpoint of that, `FAILED` where it did not.
        """
        with self.lock:
            return self._train()

    def _train(self) -> int:
        topology = self.topology
        age_s = placement.process_age_s()
        self.account.startup_s += topology.run_collective(
            lambda: max(topology.all_ranks.allgather(age_s)), SERVER, "start"
        )
        self._started_s = time.monotonic()
        last = None if self._found.checkpoint is None else self._found.checkpoint.path
        folder = self.path / CHECKPOINTS
        self._checkpointer = Checkpointer(self.config, self.averager, folder, last, self.lock.beat)
        self._stopped_by: str | None = None
        path = self.path / "metrics" / file_name(topology.rank, len(self._segments))
        rows = rows_before(self._segments, topology.rank)
        about = attributes(self.config, self.task.name, topology) | self.feed.about()
        form = (about, self.config.flush_seconds, rows, topology, self.account)
        self.record = Record(path, *form, self.total_steps, self.averager.progress.step)
        self.record.announce(self.config, self.task.name, self.path, self._warnings, self._found)
        self._begin_listening()
        result = None
        try:
            if topology.is_server:
                self._serve()
            else:
                result = self._run()
        except (SickLearnersError, CorruptionError) as error:
            self.lock.release()
            failures.end_job(error, self.config, topology, self._checkpointer.last)
        finally:
            self.record.close()
        status = self._conclude(result)
        self.lock.release()
        with topology.waiting("end of the run", SERVER):
            topology.free()
        return status

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _find(self) -> resume.Found:
        """Return what the run goes on from; a folder that is there is locked, and will not change under our hands."""
        if self.config.output is not None and os.path.isdir(self.config.output):
            self.lock.take(Path(self.config.output))
        return resume.find(self.config)

    def _is_of_as_many(self, saved: Checkpoint) -> bool:
        return saved.manifest.num_ranks == self.topology.num_learners

    def _go_on_from(self, saved: Checkpoint) -> None:
        """Be where the learner was that wrote `saved`; where there were more or fewer, where their mean was."""
        resume.check_data(self.config, saved, len(self.feed.data.train_inputs))
        if self._is_of_as_many(saved):
            loop = collective.restore(self.averager, saved.load(self.topology.rank))
            self.passes.load_state_dict(loop["passes"])
            self.epoch, self._losses = int(loop["epoch"]), list(loop["losses"].to(self.device))
            self.account = Account(**loop["account"])
            collective.check_form(asdict(Account()), asdict(self.account))
            self.feed.go_to(*map(int, loop["position"]))
            if self.scheduler is not None:
                self.scheduler.load_state_dict(loop["scheduler"])
            return
        step, before, now = saved.manifest.step, saved.manifest.about["steps_per_epoch"], self.feed.steps_per_epoch
        loop = saved.load(self.topology.rank % saved.manifest.num_ranks, ["loop"])["loop"]
        is_evaluated = step < (loop["epoch"] + 1) * before
        if self.config.steps is None:  # the run's length is counted in epochs, which have other numbers of steps now
            step = round(step * now / before)
        step = min(step, self.total_steps)
        collective.start_again(self.averager, saved.load(0, ["averager"])["averager"]["progress"], step)
        self.epoch, batch = divmod(step, now)
        self.feed.go_to(self.epoch, batch)
        if not is_evaluated:
            self.epoch, self._losses = max(0, self.epoch - 1), list(loop["losses"].to(self.device))
        self._follow_schedule(step)

    def _create_folder(self) -> tuple[Path, list[Any]]:
        """Make the run's folder on rank 0, with what is known at the start, or find it as it was left.

        Returns its path and the history of its metrics, on every rank.
        """
        topology, saved = self.topology, self._found.checkpoint
        with topology.waiting("start", SERVER):
            nodes, self._warnings = look_around(topology, self.config, self.device, self.threads)

        def create() -> tuple[Path, list[Any]]:
            with run_folder.creating(self.config, self.task.name, self.lock) as path:

                def begin(saved: Checkpoint | None) -> list[Any]:
                    before = None if saved is None else saved.manifest.about["metrics"]
                    return begin_segment(path / "metrics", before, topology.all_ranks.Get_size())

                is_same = saved is not None and saved.path.parent.resolve() == (path / CHECKPOINTS).resolve()
                segments = saved.understand(begin) if saved is not None and is_same else begin(None)
                run_folder.write_start(path, self.config, nodes, self.threads, str(self.device))
            return path, segments

        return topology.run_on_first_rank(create)

    def _begin_listening(self) -> None:
        """Listen to signals and the clock from now on."""
        topology, averager = self.topology, self.averager
        self._is_by_step = not averager.algorithm.own_pace
        step = averager.progress.step
        self._pauses = Pauses(averager.supervisor, topology, step, self._stop_at, True, self._is_by_step)
        for early in early_signals():
            self._pauses.request(Kind.STOP, early.name)

    # -- the loop -------------------------------------------------------------------------------------------------

    def _run(self) -> Result | None:
        """Train to the end and return how it went; None where it stopped early with what it needs to go on.

        Evaluations, checkpoints and the end come where all learners are known to stand together.
        """
        averager, is_asynchronous = self.averager, self.averager.algorithm.server is not None
        self.model.train()
        self._end_epoch_if_due(averager.agreed_step)  # whose checkpoint was written before
        while not averager.done and self._stopped_by is None:
            self._train_step()
            self.record.advance(averager.progress.step)
            if self._checkpointer.is_overdue and self._pauses.requested is Kind.NOTHING:
                self._pauses.request(Kind.CHECKPOINT, "the clock")
            pause = self._pauses.end_step(averager.progress.step)
            reached = averager.agreed_step
            if reached is None:
                continue
            if not self._is_by_step:
                pause = self._pauses.agree_now()
            self._follow_schedule(reached)
            if averager.done:
                break
            if pause is not None and pause.kind is Kind.STOP:
                self._stopped_by = pause.reason
            if not is_asynchronous and (pause is not None or self._checkpointer.is_due(reached)):
                self._save(reached)
            if self._stopped_by is None:  # what goes on from the checkpoint evaluates before its first step
                self._end_epoch_if_due(reached)
        if is_asynchronous:
            return self._end_epoch(averager.progress.step)
        if self._stopped_by is not None:
            return None
        self._save(averager.agreed_step or 0.0)
        return self._end_epoch(averager.agreed_step or 0.0)

    def _train_step(self) -> None:
        """Take one step and record it."""
        account = self.account
        before = time.perf_counter()
        epoch, inputs, targets = self.feed.next()
        ready = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.passes.gradients(inputs, targets)
        try:
            self.averager.step(loss, scaler=self.passes.scaler)
        except CorruptionError as error:
            failures.part_with(error, self.topology)
        self.passes.end_step()
        averaging_s = self.record.averages(self.averager.events)
        after = time.perf_counter()
        data_s, compute_s = ready - before, after - ready - averaging_s
        step, rate = self.averager.progress.step, self.optimizer.param_groups[0]["lr"]
        self.record.add("step", step, epoch + 1, loss.detach(), rate, compute_s, data_s, averaging_s)
        account.compute_s += compute_s
        account.data_s += data_s
        account.samples += len(inputs)
        self._losses.append(loss.detach())

    def _follow_schedule(self, reached: float) -> None:
        """Let the learning rate be that of the step that has been reached."""
        if self.scheduler is not None:
            while self.scheduler.last_epoch < min(int(reached), self.total_steps):
                self.scheduler.step()

    def _end_epoch_if_due(self, reached: float | None) -> None:
        """End the epoch where all learners have taken its steps; that of the last step ends with the run."""
        is_over = reached is not None and reached >= (self.epoch + 1) * self.feed.steps_per_epoch
        if reached is not None and is_over and not self.averager.done:
            self._end_epoch(reached)

    def _end_epoch(self, reached: float) -> Result:
        """Evaluate, record and show; after the last step, take the final mean first. Collective over all learners."""
        averager, topology, before = self.averager, self.topology, time.perf_counter()
        self.epoch = epoch = max(self.epoch + 1, int(reached // self.feed.steps_per_epoch))
        what = f"evaluation after step {reached:g}"
        learners = self._evaluate(what)
        inputs = self.feed.train_inputs(epoch) if self.config.buffers == "recompute" else None
        if averager.done or self._stopped_by is not None:
            averager.finish(inputs)
            mean = self._evaluate(what)
        else:
            with averager.mean_model(inputs):
                mean = self._evaluate(what)
        own = float(torch.stack(self._losses).double().mean()) if self._losses else math.nan
        self._losses.clear()
        train_loss = topology.run_collective(
            lambda: sum(topology.learner_ranks.allgather(own)) / topology.num_learners, what=what
        )
        blocked_s = self.record.averages(self.averager.events)  # of the final mean, if any
        result = Result(train_loss, mean, learners)
        self.record.evaluation(averager.progress.step, epoch, result, self.task.count_correct is not None)
        self.record.flush()
        self.model.train()
        self.account.evaluation_s += time.perf_counter() - before - blocked_s
        averager.restart_clock()
        return result

    def _evaluate(self, what: str) -> Score:
        self.model.eval()
        return evaluate(self.passes.predict, self.task, self.feed.test_batches, self.topology, what)

    def _serve(self) -> None:
        """Serve parameters until every learner is done; record the updates as they arrive."""
        account = self.account
        for arrival in self.averager.serve():
            self.record.add("arrival", *astuple(arrival))
            account.arrivals += 1
            account.staleness_sum += arrival.staleness
            account.staleness_max = max(account.staleness_max, arrival.staleness)
        self.averager.finish()

    # -- checkpoints and the end --------------------------------------------------------------------------------------

    def _save(self, reached: float) -> None:
        """Write a checkpoint of all learners, which have reached this step; one that cannot be written is told of."""
        topology, feed, record, before = self.topology, self.feed, self.record, time.perf_counter()
        self.averager.check_health("checkpoint")  # the last good one must be one to go on from
        record.flush()
        loop = {
            "epoch": self.epoch,
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
            "position": (feed.epoch, feed.batch),
            "passes": self.passes.state_dict(),
            "account": {**asdict(record.account), "wall_s": self._wall_s()},
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
        }

        def about() -> dict[str, Any]:
            positions = topology.learner_ranks.gather(record.positions())
            history = {"resumed": self._segments, "positions": positions}
            num_samples = len(feed.data.train_inputs)
            return {"steps_per_epoch": feed.steps_per_epoch, "num_samples": num_samples, "metrics": history}

        checkpointer = self._checkpointer
        checkpointer.write(reached, loop, about)
        if checkpointer.failure is not None:
            record.tell_of("checkpoint", f"checkpoint of step {round(reached)} ({checkpointer.failure})")
        record.tell_of_remains(checkpointer.remains)
        self.account.checkpoint_s += time.perf_counter() - before

    def _wall_s(self) -> float:
        return self.account.wall_s + time.monotonic() - self._started_s

    def _conclude(self, result: Result | None) -> int:
        """Leave the record of the run, where it is at its end, and return the exit status of all ranks. Collective."""
        topology, averager, record = self.topology, self.averager, self.record
        record.flush(SERVER)
        self.account.wall_s = self._wall_s()
        is_complete, checkpointer = self._stopped_by is None, self._checkpointer
        if not is_complete:
            record.line(f"stopped at step {averager.progress.step} by {self._stopped_by}; {checkpointer.outlook}")
        if result is not None or topology.is_server:
            form = (topology, averager, self.config, self.task.name, self.feed.steps_per_epoch)

            def conclude() -> Summary | None:
                summary = summarise(*form, result, self.account, is_complete)
                if summary is not None and topology.rank == 0:  # within: should it die over this, another does it
                    record.write(lambda: save_model(self.path / run_folder.FINAL_MODEL, averager.model.state_dict()))
                    record.write(lambda: run_folder.write_json(self.path / "summary.json", summary))
                return summary

            summary = topology.run_collective(conclude, SERVER, "summary")
            if summary is not None and topology.rank == 0:
                show([(self.path, summary)])
        num_lost = topology.run_collective(
            lambda: max(topology.all_ranks.allgather(len(record.lost))), SERVER, "summary"
        )
        if not is_complete:
            return FAILED if checkpointer.last is None or checkpointer.failure is not None else REQUEUE
        if num_lost:
            record.line(f"warning: the run is complete; its record is not: {record.losses()}")
        return RECORDS_LOST if num_lost else 0
