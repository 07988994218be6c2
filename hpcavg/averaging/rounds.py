"""Rounds: the steps between two global means, and the time, speed and loss that schedules follow."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpcavg.algorithms.rule import Rule
from hpcavg.algorithms.schedule import Run
from hpcavg.averaging.calls import Told
from hpcavg.averaging.paces import Paces
from hpcavg.distributed.topology import Topology
from hpcavg.engines.reduction import Values


class Rounds:
    """Measures the rounds of a rank's learners, and sets the learning rate if the rule has one.

    Parameters
    ----------
    rule : the algorithm.
    run : the run of the rank's first learner.
    paces : the learners of the rank. They agree with those of other ranks at the end of a round.
    topology : all learners.
    optimizer : the local optimizer. The rule's learning rate is set in its parameter groups.
    """

    def __init__(
        self, rule: Rule, run: Run, paces: Paces, topology: Topology, optimizer: torch.optim.Optimizer
    ) -> None:
        self._rule = rule
        self._needs_agreement = rule.own_pace or rule.agrees_on != "nothing"
        self._paces = paces
        self._topology = topology
        self._optimizer = optimizer
        self._rate = None if rule.rate is None else rule.rate(run)
        self._first_rates = [float(group["lr"]) for group in optimizer.param_groups]
        self._loss_sum: float | Tensor = 0.0  # of every learner, shape (learners,), or of the only one
        self._step_seconds: list[float] = []
        self.restart_clock()

    def restart_clock(self) -> None:
        """Restart the clock of the round."""
        self._round_started = self._step_started = time.perf_counter()

    def begin_step(self, loss: float | Tensor | None) -> None:
        """Measure what schedules follow (time, speed, loss) and set the learning rate, at the start of a step."""
        now = time.perf_counter()
        for pace in self._paces:
            pace.progress.round_seconds = now - self._round_started
        progress = self._paces[0].progress
        if self._rule.agrees_on == "speed" and progress.round == 0:
            self._step_seconds.append(now - self._step_started)
            self._step_started = now
        elif self._rule.agrees_on == "loss" and loss is not None:
            self._loss_sum = self._loss_sum + (loss.detach().double() if isinstance(loss, Tensor) else float(loss))
        if self._rate is not None:
            for group, first_rate in zip(self._optimizer.param_groups, self._first_rates, strict=True):
                group["lr"] = self._rate(progress, first_rate)

    def report(self) -> list[Told] | None:
        """Return what each learner tells the others at the end of a round; None if the rule needs no agreement."""
        if not self._needs_agreement:
            return None
        # The median leaves out slow first steps, which warm caches up.
        seconds = median(self._step_seconds) if self._step_seconds else math.nan
        return [
            (self._loss_of(row) / (pace.progress.step - pace.progress.round_step), seconds, pace.progress.step)
            for pace in self._paces
            for row in pace.rows
        ]

    def _loss_of(self, row: int) -> float:
        """Return the sum of a learner's losses in this round."""
        losses = self._loss_sum
        return float(losses[row] if isinstance(losses, Tensor) and losses.ndim else losses)

    def end(self, told: Values | None) -> None:
        """Begin the next round. Collective over all learners if they need an agreement and have not told each other.

        Parameters
        ----------
        told : the `report` of every learner, shape (learners, 3); None if they have not told each other.
        """
        own = self.report()
        if own is not None:
            self._agree(own[0][1], self._gather(own) if told is None else told)
        for pace in self._paces:
            pace.end_round()
        self._round_started = time.perf_counter()

    def _gather(self, own: list[Told]) -> Values:
        """Return the reports of all learners. Collective over all learners."""
        number = self._paces[0].progress.round + 1

        def gather() -> Values:
            gathered = np.empty((self._topology.num_learners, len(own[0])))
            self._topology.learner_ranks.Allgather(np.array(own), gathered)
            return gathered

        return self._topology.run_collective(gather, what=f"agreement of round {number}")

    def _agree(self, seconds: float, gathered: Values) -> None:
        """Put what follows from the reports of all learners into the progress of this rank's learners.

        Parameters
        ----------
        seconds : this rank's time of a step.
        gathered : the reports, shape (learners, 3).
        """
        loss, _, mean_step = map(float, gathered.mean(axis=0))
        known = gathered[np.isfinite(gathered[:, 0]), 0]
        if 0 < len(known) < len(gathered):  # leave out the losses of sick learners
            loss = float(known.mean())
        slowest = gathered[:, 1].max()
        for progress in (pace.progress for pace in self._paces):
            progress.mean_step = mean_step
            if self._rule.agrees_on == "loss":
                progress.first_loss = loss if progress.first_loss is None else progress.first_loss
                progress.loss = loss
            elif self._rule.agrees_on == "speed" and progress.round == 0:
                progress.relative_speed = float(slowest / seconds)
                progress.mean_speed = float((slowest / gathered[:, 1]).mean())
        self._loss_sum = 0.0

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return what a resumed run needs of a learner besides its progress, as plain values."""
        return {"first_rates": list(self._first_rates), "loss_sum": self._loss_of(row)}

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Continue from what `state_dict_of` returned for each learner of the rank."""
        self._first_rates = list(states[0]["first_rates"])
        sums = [state["loss_sum"] for state in states]
        self._loss_sum = sums[0] if len(sums) == 1 else torch.tensor(sums, dtype=torch.float64)
        self._round_started = time.perf_counter() - self._paces[0].progress.round_seconds
