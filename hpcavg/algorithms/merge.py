"""HOW: what a learner does with a mean. In place, on flat buffers of shape (learners, numel).

A `Merge` may keep state between means (an anchor, a momentum): `init` makes it from the starting parameters, `apply`
reads and updates it. The state is a dictionary of tensors, so a checkpoint can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]


class Merge(Protocol):
    """One way of putting a mean into the parameters."""

    reads_parameters: bool
    """False if the result is the same whatever the parameters were: the mean may then be formed in their place."""
    agrees: bool
    """True if learners that merged the same mean hold the same parameters afterwards."""

    def init(self, x: Tensor) -> State:
        """Return the state that goes with parameters `x`, shape (learners, numel)."""

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Merge `mean`, shape (numel,), into every row of `x`. rate : the local optimizer's learning rate.

        `mean` may be a row of `x` where parameters are not read.
        """


class Replace:
    """x = mean: what every blocking algorithm of the five papers does."""

    reads_parameters = False
    agrees = True

    def init(self, x: Tensor) -> State:
        """Keep nothing."""
        return {}

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Copy the mean into every row but the one that it may be."""
        for row in x:
            if row.data_ptr() != mean.data_ptr():
                row.copy_(mean)  # x_j = mean


class Blend:
    """x = ξ x + (1 - ξ) mean (DaSGD, eq. 4)."""

    reads_parameters = True
    agrees = False

    def __init__(self, xi: float) -> None:
        self.xi = xi

    def init(self, x: Tensor) -> State:
        """Keep nothing."""
        return {}

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Blend every row with the mean."""
        x.mul_(self.xi).add_(mean, alpha=1 - self.xi)  # x_j = ξ x_j + (1 - ξ) mean


class OuterMomentum:
    """An optimizer of its own steps from the last merge's result, the anchor, along Δ = anchor - mean.

    Without momentum and at an outer rate of 1 the result is the mean itself, bit for bit.

    Parameters
    ----------
    outer_rate : learning rate of the outer optimizer (α in SlowMo).
    momentum : its momentum (β in SlowMo).
    nesterov : use Nesterov's form, as DiLoCo; otherwise the heavy ball, as SlowMo.
    per_rate : keep the momentum per unit of the local learning rate γ, as SlowMo; it then follows changes of γ.
    """

    reads_parameters = False
    agrees = True

    def __init__(self, outer_rate: float, momentum: float, nesterov: bool, per_rate: bool) -> None:
        self.outer_rate = outer_rate
        self.momentum = momentum
        self.nesterov = nesterov
        self.per_rate = per_rate

    def init(self, x: Tensor) -> State:
        """Return the anchor, the momentum v (none where its factor is 0) and the local rate that v was scaled by."""
        import torch

        state = {"anchor": x[0].clone()}
        if self.momentum:
            state |= {"momentum": torch.zeros_like(x[0]), "rate": torch.zeros((), dtype=torch.float64)}
        return state

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Step from the anchor and make the result the next anchor and every row."""
        anchor, weight = state["anchor"], self.outer_rate
        if not self.momentum or (self.per_rate and rate == 0):  # γ u is 0 where γ is
            anchor.lerp_(mean, weight)  # x = anchor - α Δ
        else:
            # SlowMo's u = β u + Δ/γ, x = anchor - α γ u, with v = γ u: no division by a rate that may be 0.
            velocity, factor = state["momentum"], self.momentum
            if self.per_rate:
                last_rate = float(state["rate"])
                velocity.mul_(rate / last_rate if last_rate > 0 else 1.0)
                state["rate"].fill_(rate)
            velocity.mul_(factor).add_(anchor).sub_(mean)  # v = β v + Δ
            if self.nesterov:
                anchor.lerp_(mean, weight).sub_(velocity, alpha=weight * factor)  # x = anchor - α (Δ + β v)
            else:
                anchor.sub_(velocity, alpha=weight)  # x = anchor - α v
        x.copy_(anchor)


replace = Replace()
