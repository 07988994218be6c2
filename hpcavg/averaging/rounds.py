"""Rounds: the steps between two global means, and the time, speed and loss that schedules follow."""

from __future__ import annotations

import math
import time
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Progress, Run
from hpcavg.averaging.calls import Told
from hpcavg.distributed.topology import Topology
from hpcavg.engines.reduction import Values


class Rounds:
    """Measures the rounds of one learner, and sets the learning rate if the rule has one.

    Parameters
    ----------
    rule : the algorithm.
    run : this learner's run.
    topology : the learners, which agree at the end of a round.
    optimizer : the local optimizer. The rule's learning rate is set in its parameter groups.
    """

    def __init__(self, rule: Rule, run: Run, topology: Topology, optimizer: torch.optim.Optimizer) -> None:
        self._rule = rule
        self._topology = topology
        self._optimizer = optimizer
        self._rate = None if rule.rate is None else rule.rate(run)
        self._first_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._loss_sum: float | Tensor = 0.0
        self._step_seconds: list[float] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock of the round."""
        self._round_started = self._step_started = time.perf_counter()

    def begin_step(self, progress: Progress, loss: float | Tensor | None) -> None:
        """Measure what schedules follow (time, speed, loss) and set the learning rate, at the start of a step."""
        now = time.perf_counter()
        progress.round_seconds = now - self._round_started
        if self._rule.agrees_on == "speed" and progress.round == 0:
            self._step_seconds.append(now - self._step_started)
            self._step_started = now
        elif self._rule.agrees_on == "loss" and loss is not None:
            self._loss_sum = self._loss_sum + (loss.detach().double() if isinstance(loss, Tensor) else float(loss))
        if self._rate is not None:
            for group, first_rate in zip(self._optimizer.param_groups, self._first_rates, strict=True):
                group["lr"] = self._rate(progress, first_rate)

    @property
    def _needs_agreement(self) -> bool:
        return self._rule.own_pace or self._rule.agrees_on != "nothing"

    def report(self, progress: Progress) -> Told | None:
        """Return what this learner tells the others at the end of a round; None if the rule needs no agreement."""
        if not self._needs_agreement:
            return None
        loss = float(self._loss_sum) / (progress.step - progress.round_step)
        # The median leaves out slow first steps, which warm caches up.
        return loss, median(self._step_seconds) if self._step_seconds else math.nan, progress.step

    def end(self, progress: Progress, told: Values | None) -> None:
        """Begin the next round. Collective over all learners if they need an agreement and have not told each other.

        Parameters
        ----------
        progress : this learner's progress.
        told : the `report` of every learner, shape (learners, 3); None if they have not told each other.
        """
        own = self.report(progress)
        if own is not None:
            self._agree(progress, own, self._gather(progress, own) if told is None else told)
        progress.round += 1
        progress.round_step = progress.step
        self._round_started = time.perf_counter()

    def _gather(self, progress: Progress, own: Told) -> Values:
        """Return the reports of all learners. Collective over all learners."""

        def gather() -> Values:
            gathered = np.empty((self._topology.num_learner_ranks, len(own)))
            self._topology.learner_ranks.Allgather(np.array(own), gathered)
            return gathered

        return self._topology.run_collective(gather, what=f"agreement of round {progress.round + 1}")

    def _agree(self, progress: Progress, own: Told, gathered: Values) -> None:
        """Put what follows from the reports of all learners into `progress`."""
        seconds = own[1]
        loss, _, progress.mean_step = map(float, gathered.mean(axis=0))
        known = gathered[np.isfinite(gathered[:, 0]), 0]
        if 0 < len(known) < len(gathered):  # leave out the losses of sick learners
            loss = float(known.mean())
        if self._rule.agrees_on == "loss":
            progress.first_loss = loss if progress.first_loss is None else progress.first_loss
            progress.loss = loss
            self._loss_sum = 0.0
        elif self._rule.agrees_on == "speed" and progress.round == 0:
            slowest = gathered[:, 1].max()
            progress.relative_speed, progress.mean_speed = (
                float(slowest / seconds),
                float((slowest / gathered[:, 1]).mean()),
            )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs besides `progress`, as plain values."""
        return {"first_rates": list(self._first_rates), "loss_sum": float(self._loss_sum)}

    def load_state_dict(self, state: dict[str, Any], progress: Progress) -> None:
        """Continue from what `state_dict` returned."""
        self._first_rates = list(state["first_rates"])
        self._loss_sum = state["loss_sum"]
        self._round_started = time.perf_counter() - progress.round_seconds
