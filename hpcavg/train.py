"""The training run: set up together, loop, evaluate the mean model, leave a record."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg import checkpoint, eager, learning_rate, placement, run_folder, state_file, tasks
from hpcavg.averager import Averager
from hpcavg.config import Config
from hpcavg.data.partition import PARTITIONS, Indices, batches, num_batches, shard_size
from hpcavg.errors import InputError
from hpcavg.metrics import Recorder, file_name, write_view
from hpcavg.node_memory import share_array
from hpcavg.progress import Display, display
from hpcavg.summary import Summary, counted, show
from hpcavg.tasks import Data, Task
from hpcavg.topology import Topology, wait_asleep

_EVALUATION_BATCH = 1024


@dataclass
class _Account:
    """What this rank did, beside its averages."""

    samples: int = 0
    compute_s: float = 0.0
    data_s: float = 0.0
    consensus_distance: float = math.nan
    arrivals: int = 0
    staleness_sum: int = 0
    staleness_max: int = 0


@dataclass(frozen=True)
class _Score:
    """Mean loss and accuracy over the test samples a rank, or all ranks, looked at; accuracy is NaN without one."""

    loss: float
    accuracy: float


class Trainer:
    """One rank of a training run: everything the loop needs, set up in agreement with the other ranks.

    Raises `InputError` on every rank when any rank finds the configuration, the task or its data unusable; nothing has
    been written then.
    """

    def __init__(self, config: Config) -> None:
        eager.defer_compiler_import()
        wait_asleep(MPI.COMM_WORLD)
        self.config = config
        self.topology = topology = Topology(group_size=config.group_size, num_servers=config.servers)
        self.device = topology.do_together(lambda: placement.choose_device(config.device, topology.node_rank))
        self.threads = config.threads or placement.num_threads(topology.node)
        torch.set_num_threads(self.threads)
        self.task = topology.do_together(lambda: tasks.load(config))
        self.data = _load_data(self.task, topology)
        self._check_batch_size()
        self.steps_per_epoch = num_batches(len(self.data.train_inputs), topology.num_learners, config.batch_size)
        self.total_steps = config.steps or (config.epochs or 0) * self.steps_per_epoch
        torch.manual_seed(config.seed)
        self.dtype = getattr(torch, config.dtype)
        self.model = topology.do_together(lambda: tasks.build_model(self.task)).to(self.device, self.dtype)
        self.optimizer = self._build_optimizer()
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
        )
        # From here on learners differ: dropout and other random layers draw from the learner's own stream.
        torch.manual_seed(self.averager.generator.initial_seed())
        self.scheduler = learning_rate.build(config, self.optimizer, self.total_steps)
        self.account = _Account()
        self.path = self._create_folder()

    def train(self) -> None:
        """Train to the end and leave the run's record in `path`. Collective."""
        config, topology = self.config, self.topology
        startup_s = topology.everyone.allreduce(placement.process_age_s(), MPI.MAX)
        recorder = Recorder(self.path / "metrics" / file_name(topology.rank), self._attributes(), config.flush_seconds)
        shown = display(topology.rank, self.total_steps)
        servers = f", {counted(topology.num_servers, 'server')}" if topology.num_servers else ""
        shown.line(
            f"{config.algorithm.replace('_', '-')} on {self.task.name}: {counted(topology.num_learners, 'learner')},"
            f" {counted(topology.num_groups, 'local group')}{servers}, {counted(topology.num_nodes, 'node')};"
            f" {counted(self.total_steps, 'step')}; {self.path}"
        )
        started = time.perf_counter()
        result = None
        try:
            if topology.is_server:
                self._serve(recorder)
            else:
                result = self._run(recorder, shown)
        finally:
            shown.close()
            recorder.close()
        wall_s = time.perf_counter() - started
        accounts = [_Account(*account) for account in topology.everyone.allgather(astuple(self.account))]
        if result is not None:
            train_loss, mean, learners = result
            if not math.isfinite(train_loss):
                shown.line(f"warning: the training loss is {train_loss}; the run has diverged")
            summary = self._summarise(train_loss, mean, learners, wall_s, startup_s, accounts)
            if topology.rank == 0:
                checkpoint.save_model(self.path / "checkpoints" / "final.safetensors", self.model.state_dict())
                run_folder.write_json(self.path / "summary.json", summary)
                show([(self.path, summary)])
        topology.free()

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _check_batch_size(self) -> None:
        samples, learners = len(self.data.train_inputs), self.topology.num_learners
        share = shard_size(samples, learners)
        if self.config.batch_size > share:
            raise InputError(
                "batch_size",
                self.config.batch_size,
                f"at most {share}, a learner's share of {samples} samples over {learners} learners",
            )

    def _build_optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config, self.model.parameters()
        rate, decay = config.learning_rate, config.weight_decay
        if config.optimizer == "sgd":
            return torch.optim.SGD(parameters, rate, config.momentum, weight_decay=decay, nesterov=config.nesterov)
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, rate, weight_decay=decay)

    def _create_folder(self) -> Path:
        """Make the run's folder on rank 0, with what is known at the start; return its path on every rank."""
        topology = self.topology
        path = topology.do_together(
            lambda: run_folder.create(self.config, self.task.name) if topology.rank == 0 else None
        )
        path = topology.everyone.bcast(path, root=0)
        nodes = topology.everyone.allgather(MPI.Get_processor_name())
        if topology.rank == 0:
            run_folder.write_start(path, self.config, sorted(set(nodes)), self.threads, str(self.device))
            write_view(path / "metrics", topology.everyone.Get_size())
        return path

    def _attributes(self) -> dict[str, object]:
        topology = self.topology
        return {
            "algorithm": self.config.algorithm,
            "task": self.task.name,
            "seed": self.config.seed,
            "num_learners": topology.num_learners,
            "rank": topology.rank,
            "role": "server" if topology.is_server else "learner",
            "group": topology.group,
            "node": MPI.Get_processor_name(),
        }

    # -- data -----------------------------------------------------------------------------------------------------

    def epoch_indices(self, epoch: int) -> Indices:
        """Return the samples this learner sees in `epoch`, in order."""
        config, topology = self.config, self.topology
        return PARTITIONS[config.partition](
            len(self.data.train_inputs), topology.num_learners, topology.rank, config.batch_size, config.seed, epoch
        )

    def to_device(self, array: Any) -> Tensor:
        """Return samples as a tensor on the learner's device, floating-point ones in the run's dtype."""
        tensor = torch.from_numpy(array)
        dtype = self.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(self.device, dtype)

    def mini_batches(self) -> Iterator[tuple[int, Indices]]:
        """Yield epoch and sample indices of this learner's mini-batches, epoch after epoch, without end."""
        for epoch in itertools.count():
            for index in batches(self.epoch_indices(epoch), self.config.batch_size):
                yield epoch, index

    def train_inputs(self, epoch: int) -> Iterator[Tensor]:
        """Yield the inputs of one epoch without training on them, to re-estimate BatchNorm statistics."""
        for index in batches(self.epoch_indices(epoch), self.config.batch_size):
            yield self.to_device(self.data.train_inputs[index])

    # -- the loop -------------------------------------------------------------------------------------------------

    def _run(self, recorder: Recorder, shown: Display) -> tuple[float, _Score, _Score]:
        """Train to the end; return the last epoch's training loss and the scores of the mean and of the learners.

        Evaluations and the end come where all learners are known to stand together.
        """
        averager, mini_batches = self.averager, self.mini_batches()
        epoch, losses = 0, []
        self.model.train()
        while True:
            losses.append(self._train_step(mini_batches, recorder))
            shown.advance()
            reached = averager.agreed_step
            if reached is None:
                continue
            if self.scheduler is not None:
                while self.scheduler.last_epoch < min(int(reached), self.total_steps):
                    self.scheduler.step()
            if reached < (epoch + 1) * self.steps_per_epoch and not averager.done:
                continue
            epoch = max(epoch + 1, int(reached // self.steps_per_epoch))
            result = self._end_epoch(epoch, float(torch.stack(losses).double().mean()), recorder, shown)
            losses.clear()
            if averager.done:
                return result

    def _train_step(self, mini_batches: Iterator[tuple[int, Indices]], recorder: Recorder) -> Tensor:
        """Take one step and record it; return its loss."""
        account = self.account
        before = time.perf_counter()
        epoch, index = next(mini_batches)
        inputs = self.to_device(self.data.train_inputs[index])
        targets = self.to_device(self.data.train_targets[index])
        ready = time.perf_counter()
        self.optimizer.zero_grad()
        loss = self.task.loss(self.model(inputs), targets)
        loss.backward()
        self.averager.step(loss)
        averaging_s = self._record_averages(recorder)
        after = time.perf_counter()
        data_s, compute_s = ready - before, after - ready - averaging_s
        step, rate = self.averager.progress.step, self.optimizer.param_groups[0]["lr"]
        recorder.record("step", step, epoch + 1, loss.detach(), rate, compute_s, data_s, averaging_s)
        account.compute_s += compute_s
        account.data_s += data_s
        account.samples += len(index)
        return loss.detach()

    def _end_epoch(
        self, epoch: int, train_loss: float, recorder: Recorder, shown: Display
    ) -> tuple[float, _Score, _Score]:
        """Evaluate, record and show; return the training loss of all learners and the scores. Collective."""
        mean, learners = self._evaluate_epoch(epoch)
        train_loss = self.topology.world.allreduce(train_loss) / self.topology.num_learners
        step = self.averager.progress.step
        self._record_averages(recorder)
        recorder.record(
            "evaluation", step, epoch, train_loss, mean.loss, mean.accuracy, learners.loss, learners.accuracy
        )
        recorder.flush()
        line = f"epoch {epoch:3d}  step {step:6d}  train loss {train_loss:.4f}  test loss {mean.loss:.4f}"
        if self.task.count_correct is not None:
            line += f"  accuracy {mean.accuracy:.4f}  (learners {learners.accuracy:.4f})"
        shown.line(line)
        self.model.train()
        self.averager.restart_clock()
        return train_loss, mean, learners

    def _serve(self, recorder: Recorder) -> None:
        """Serve parameters until every learner is done; record the updates as they arrive."""
        account = self.account
        for arrival in self.averager.serve():
            recorder.record("arrival", *astuple(arrival))
            account.arrivals += 1
            account.staleness_sum += arrival.staleness
            account.staleness_max = max(account.staleness_max, arrival.staleness)
        self.averager.finish()

    def _record_averages(self, recorder: Recorder) -> float:
        """Move the averager's events into the metrics; return the seconds they blocked this learner."""
        blocked_s = 0.0
        events = self.averager.events
        while events:
            event = events.popleft()
            blocked_s += event.blocked_s
            if not math.isnan(event.consensus_distance):
                self.account.consensus_distance = event.consensus_distance
            recorder.record(
                "averaging",
                event.step,
                event.scope.value,
                event.period_steps,
                event.started_s,
                event.blocked_s,
                event.in_flight_s,
                event.num_bytes,
                event.consensus_distance,
            )
        return blocked_s

    def _evaluate_epoch(self, epoch: int) -> tuple[_Score, _Score]:
        """Return the scores of the mean model and of the learners' own; after the last epoch the mean is final."""
        learners = self._evaluate()
        inputs = self.train_inputs(epoch) if self.config.buffers == "recompute" else None
        if self.averager.done:
            self.averager.finish(inputs)
            return self._evaluate(), learners
        with self.averager.mean_model(inputs):
            return self._evaluate(), learners

    def _evaluate(self) -> _Score:
        """Return loss and accuracy over the test set, each rank's model on its own part of it."""
        samples = np.arange(len(self.data.test_inputs))[self.topology.rank :: self.topology.num_learners]
        total_loss = total_correct = 0.0
        self.model.eval()
        with torch.no_grad():
            for index in batches(samples, _EVALUATION_BATCH):
                output = self.model(self.to_device(self.data.test_inputs[index]))
                targets = self.to_device(self.data.test_targets[index])
                total_loss += float(self.task.loss(output, targets)) * len(index)
                if self.task.count_correct is not None:
                    total_correct += float(self.task.count_correct(output, targets))
        totals = np.array([total_loss, total_correct])
        self.topology.world.Allreduce(MPI.IN_PLACE, totals)
        loss, accuracy = totals / len(self.data.test_inputs)
        return _Score(float(loss), float(accuracy) if self.task.count_correct is not None else float("nan"))

    # -- the record -----------------------------------------------------------------------------------------------

    def _summarise(
        self,
        train_loss: float,
        mean: _Score,
        learners: _Score,
        wall_s: float,
        startup_s: float,
        accounts: list[_Account],
    ) -> Summary:
        """Return the run's summary; times are means over the learners. Collective over these."""
        topology, totals, averager = self.topology, self.averager.totals, self.averager
        own, servers = accounts[: topology.num_learners], accounts[topology.num_learners :]
        sums = np.array([totals.blocked_s, totals.in_flight_s, wall_s, averager.progress.step])
        topology.world.Allreduce(MPI.IN_PLACE, sums)
        blocked_s, in_flight_s, wall_s, steps = (sums / topology.num_learners).tolist()
        arrivals = sum(server.arrivals for server in servers)
        distance = sum(account.consensus_distance for account in own) / len(own)
        return Summary(
            algorithm=self.config.algorithm,
            task=self.task.name,
            num_learners=topology.num_learners,
            num_servers=topology.num_servers,
            num_ranks=topology.everyone.Get_size(),
            num_nodes=topology.num_nodes,
            group_size=max(topology.group_sizes.values()),
            steps=round(steps),
            epochs=steps / self.steps_per_epoch,
            samples=sum(account.samples for account in own),
            samples_per_learner=[account.samples for account in own],
            train_loss=train_loss,
            test_loss=mean.loss,
            test_accuracy=mean.accuracy,
            learner_test_loss=learners.loss,
            learner_test_accuracy=learners.accuracy,
            global_averages=totals.global_averages,
            local_averages=totals.local_averages,
            exchanges=totals.exchanges,
            staleness_mean=sum(server.staleness_sum for server in servers) / arrivals if arrivals else None,
            staleness_max=max(server.staleness_max for server in servers) if arrivals else None,
            consensus_distance=None if math.isnan(distance) else distance,
            bytes_averaged=totals.bytes_averaged,
            wall_s=wall_s,
            compute_s=sum(account.compute_s for account in own) / len(own),
            data_s=sum(account.data_s for account in own) / len(own),
            averaging_blocked_s=blocked_s,
            hidden_fraction=max(0.0, 1 - blocked_s / in_flight_s)
            if averager.algorithm.delay_steps and in_flight_s
            else None,
            startup_s=startup_s,
            seed=self.config.seed,
            parameters_sha256=state_file.digest(self.model.state_dict()),
            completed=True,
        )


def _load_data(task: Task, topology: Topology) -> Data:
    """Return the task's data in memory that the node's ranks share; one rank of each node loads it."""
    own = topology.do_together(lambda: tasks.load_data(task) if topology.node_rank == 0 else None)
    return Data(
        *(share_array(topology.node, None if own is None else own[field]) for field in range(len(Data._fields)))
    )
