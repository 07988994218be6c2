"""The training run of one rank: set up in agreement with the others, trained, concluded."""

from __future__ import annotations

import os
import time
import uuid
from functools import partial
from pathlib import Path

import torch
from mpi4py import MPI

from hpcavg import tasks
from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging.averager import Averager
from hpcavg.averaging.stacked import stack
from hpcavg.checkpoints import random_state, resume
from hpcavg.checkpoints.manager import CheckpointManager
from hpcavg.checkpoints.mean_model import load_mean_model
from hpcavg.checkpoints.store import Checkpoint, save_model
from hpcavg.config.options import CHECKPOINTS, Config
from hpcavg.distributed.preemption import PauseKind, Pauses, deadline
from hpcavg.distributed.processes import process_age_s
from hpcavg.distributed.signals import early_signals
from hpcavg.distributed.waiting import wait_asleep
from hpcavg.distributed.watchdog import watch_over
from hpcavg.errors import CorruptionError, SickLearnersError
from hpcavg.machine import cores, devices
from hpcavg.machine.inspection import inspect_job
from hpcavg.results import run_folder, summary
from hpcavg.results.run_lock import RunLock, this_process
from hpcavg.results.view import Positions, begin_segment, file_name, rows_before
from hpcavg.training import eager, failures, optimizers, trial
from hpcavg.training.evaluation import Evaluation
from hpcavg.training.forward_backward import ForwardBackward
from hpcavg.training.learners import Learners
from hpcavg.training.loader import BatchLoader
from hpcavg.training.loop import Loop
from hpcavg.training.loop_state import LoopState
from hpcavg.training.run_recorder import RunRecorder, attributes
from hpcavg.training.run_totals import summarise
from hpcavg.utils.exit_status import ExitStatus


class Trainer:
    """One rank of a training run, set up in agreement with the other ranks. Collective.

    Parameters
    ----------
    config : Config
        All options of the run.
    comm : MPI.Intracomm or None
        The ranks of the run, which may be a part of a job. None: those of `failures.all_ranks`.

    Attributes
    ----------
    path : Path
        The run's folder.
    averager : Averager
        Holds the model and the optimizer.
    state : LoopState
        What the rank's learners train with, and how far they have come.

    Raises
    ------
    InputError
        On every rank, if any rank cannot use the configuration, the task, its data, or the checkpoint to go on from.
        Nothing has been written then.
    """

    def __init__(self, config: Config, comm: MPI.Intracomm | None = None) -> None:
        eager.defer_compiler_import()
        wait_asleep(MPI.COMM_WORLD if comm is None else comm)
        self.config, self._is_job = config, comm is None
        self.topology = topology = failures.build_topology(config, failures.all_ranks(config) if comm is None else comm)
        run = topology.all_ranks.bcast(uuid.uuid4().hex)
        self.lock = RunLock(this_process(run, has_heirs=topology.survives), failures.abort_after_takeover)
        with self.lock:
            self._set_up()

    def _set_up(self) -> None:
        config, topology = self.config, self.topology
        self.device = topology.run_on_all_ranks(lambda: devices.choose_device(config.run.device, topology.node_rank))
        self.threads = config.run.threads or cores.num_threads(topology.node)
        torch.set_num_threads(self.threads)
        now = time.monotonic(), time.time(), process_age_s()
        limits = config.faults.stop_after, config.faults.stop_margin
        self._stop_at = topology.run_on_all_ranks(lambda: deadline(*now, *limits, os.environ))
        self.task = topology.run_on_all_ranks(lambda: tasks.load(config))
        loader = BatchLoader(self.task, config, topology, self.device)
        total_steps = config.run.steps or (config.run.epochs or 0) * loader.steps_per_epoch
        self._found = topology.run_on_first_rank(self._find)
        random_state.seed_generators(config.run.seed)
        built = topology.run_on_all_ranks(lambda: tasks.build_model(self.task))
        model = built.to(self.device, getattr(torch, config.run.dtype))
        optimizer, passes = self._make_passes(model)
        topology.run_on_all_ranks(
            lambda: None if topology.is_server else trial.check(config, self.task, passes, loader)
        )
        saved = self._found.checkpoint
        if saved is not None and saved.manifest.num_ranks != topology.num_learners:
            fill = partial(load_mean_model, model)  # the averager gives rank 0's model to all
            topology.run_on_all_ranks(lambda: saved.understand(fill) if topology.rank == 0 else None)
        if topology.learners_per_rank > 1:
            randomness = config.run.stacked_randomness
            model = topology.run_on_all_ranks(lambda: stack(model, topology.learners_per_rank, randomness))
            optimizer, passes = self._make_passes(model)
            passes.attempt(loader.peek()[0])  # which finds out whether they can compute all at once
        self.model, self.passes = model, passes
        watch_over(topology, config.faults.hang_timeout, lambda: failures.abort(config))
        with topology.waiting("start", SERVER):
            self.averager = Averager(
                model,
                optimizer,
                config.rule(),
                topology,
                config.averaging,
                seed=config.run.seed,
                total_steps=total_steps,
                batch_size=config.run.batch_size,
                hang_timeout=config.faults.hang_timeout,
            )
        if config.run.compile:
            passes.compile(loader.peek, topology)
        # From here on learners differ: dropout and other random layers draw from the learner's own stream.
        learners = Learners(model, config.run.stacked_randomness == "exact")
        learners.seed([generator.initial_seed() for generator in self.averager.generators])
        scheduler = optimizers.build_scheduler(config.optimization, optimizer, total_steps, loader.steps_per_epoch)
        self.state = LoopState(config, self.device, self.averager, learners, passes, loader, scheduler, total_steps)
        if saved is not None:
            topology.run_on_all_ranks(lambda: saved.understand(self.state.go_on_from))
        self.path, self.state.segments = self._create_folder()
        topology.on_shrink(lambda: None if topology.rank else self.lock.inherit(self.path))

    def _make_passes(self, model: torch.nn.Module) -> tuple[torch.optim.Optimizer, ForwardBackward]:
        """Return the optimizer of `model`, and its forward and backward passes. Collective over all ranks."""
        optimizer = optimizers.build_optimizer(self.config.optimization, model.parameters())
        form = self.config, self.task, model, optimizer
        return optimizer, self.topology.run_on_all_ranks(lambda: ForwardBackward(*form))

    def _find(self) -> resume.ResumePoint:
        """Return what the run goes on from. A folder that exists is locked first, so that it does not change."""
        if self.config.run.output is not None and os.path.isdir(self.config.run.output):
            self.lock.take(Path(self.config.run.output))
        return resume.find(self.config)

    def _create_folder(self) -> tuple[Path, list[Positions]]:
        """Make the run's folder on rank 0, or take the one that is resumed; write what is known at the start.

        Returns its path and the history of its metrics, on every rank.
        """
        topology, saved = self.topology, self._found.checkpoint
        with topology.waiting("start", SERVER):
            nodes, self._warnings = inspect_job(topology, self.config, self.device, self.threads)

        def create() -> tuple[Path, list[Positions]]:
            with run_folder.creating(self.config, self.task.name, self.lock) as path:

                def begin(saved: Checkpoint | None) -> list[Positions]:
                    before = None if saved is None else saved.manifest.about["metrics"]
                    members = topology.num_learners + topology.num_servers
                    return begin_segment(path / "metrics", before, members, topology.learners_per_rank)

                is_same = saved is not None and saved.path.parent.resolve() == (path / CHECKPOINTS).resolve()
                segments = saved.understand(begin) if saved is not None and is_same else begin(None)
                run_folder.write_start(path, self.config, nodes, self.threads, str(self.device))
            return path, segments

        return topology.run_on_first_rank(create)

    # -- the run --------------------------------------------------------------------------------------------------

    def train(self) -> ExitStatus:
        """Train to the end, or until a signal or the time limit, and leave the run's records in `path`. Collective.

        Returns
        -------
        ExitStatus
            The same on all ranks. `DONE`; `RECORDS_LOST` if only records are missing; `REQUEUE` after a stop with a
            checkpoint of it, `FAILED` after one without.

        Raises
        ------
        SickLearnersError, CorruptionError
            On the learners of a communicator that was given, if the run cannot go on. Otherwise the job ends.
        """
        with self.lock:
            return self._train()

    def _train(self) -> ExitStatus:
        topology, state = self.topology, self.state
        age_s = process_age_s()
        state.totals.startup_s += topology.run_collective(
            lambda: max(topology.all_ranks.allgather(age_s)), SERVER, "start"
        )
        state.start_clock()
        self._loop = self._make_loop()
        result = None
        try:
            if topology.is_server:
                self._loop.serve()
            else:
                result = self._loop.run()
        except (SickLearnersError, CorruptionError) as error:
            self.lock.release()
            if not self._is_job:
                raise
            failures.report_and_abort(error, self.config, topology, self._checkpoints.last)
        finally:
            self.recorder.close()
        status = self._conclude(result)
        self.lock.release()
        with topology.waiting("end of the run", SERVER):
            topology.free()
        return status

    def _make_loop(self) -> Loop:
        """Return the loop. From here on metrics are recorded, and requests for checkpoints and stops are heard."""
        config, topology, averager, state = self.config, self.topology, self.averager, self.state
        last = None if self._found.checkpoint is None else self._found.checkpoint.path
        self._checkpoints = CheckpointManager(config, averager, self.path / CHECKPOINTS, last, self.lock.beat)
        path = self.path / "metrics" / file_name(topology.rank, len(state.segments))
        server = topology.num_learners + topology.rank - topology.num_learner_ranks
        rows = [
            rows_before(state.segments, member) for member in ([server] if topology.is_server else topology.learners)
        ]
        about = attributes(config, self.task.name, topology) | state.loader.about()
        step = averager.progress.step
        form = (about, config.run.flush_seconds, rows, topology, state.totals)
        steps = [progress.step for progress in averager.progress_of]
        self.recorder = RunRecorder(path, *form, state.total_steps, steps)
        warnings = [*self._warnings, *_warn_of_loop(state.learners.way)]
        self.recorder.announce(config, self.task.name, self.path, warnings, self._found)
        is_by_step = not averager.algorithm.own_pace
        pauses = Pauses(averager.supervisor, topology, step, self._stop_at, True, is_by_step)
        for early in early_signals():
            pauses.request(PauseKind.STOP, early.name)
        return Loop(self.task, state, self.recorder, self._checkpoints, pauses)

    def _conclude(self, result: Evaluation | None) -> ExitStatus:
        """Write the final model and the summary, if the run is at its end. Return the exit status. Collective."""
        topology, averager, recorder, state = self.topology, self.averager, self.recorder, self.state
        recorder.flush(SERVER)
        state.stop_clock()
        stopped_by, checkpoints = self._loop.stopped_by, self._checkpoints
        is_complete = stopped_by is None
        if not is_complete:
            recorder.line(f"stopped at step {averager.progress.step} by {stopped_by}; {checkpoints.outlook}")
        if result is not None or topology.is_server:
            form = (topology, averager, state.learners, self.config, self.task.name, state.loader.steps_per_epoch)

            def conclude() -> summary.Summary | None:
                values = summarise(*form, result, state.totals, is_complete)
                if (
                    values is not None and topology.rank == 0
                ):  # in here: if this rank dies meanwhile, another writes them
                    recorder.write(lambda: save_model(self.path / run_folder.FINAL_MODEL, state.learners.state_of(0)))
                    recorder.write(lambda: summary.write(self.path, values))
                return values

            values = topology.run_collective(conclude, SERVER, "summary")
            if values is not None and topology.rank == 0:
                summary.show([(self.path, values)])
        num_lost = topology.run_collective(
            lambda: max(topology.all_ranks.allgather(len(recorder.lost))), SERVER, "summary"
        )
        if not is_complete:
            is_saved = checkpoints.last is not None and checkpoints.failure is None
            return ExitStatus.REQUEUE if is_saved else ExitStatus.FAILED
        if num_lost:
            recorder.line(f"warning: the run is complete; its record is not: {recorder.losses()}")
        return ExitStatus.RECORDS_LOST if num_lost else ExitStatus.DONE


def _warn_of_loop(way: str | None) -> list[str]:
    """Return a line if the learners of a rank run one after the other."""
    if way is None or not way.startswith("loop"):
        return []
    return [f"the learners of a rank compute one after the other, not all at once with torch.vmap ({way[6:]})"]
