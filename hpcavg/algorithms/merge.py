"""HOW: what a learner does with a mean, in place on flat buffers of shape (learners, numel).

A merge may keep state between means, such as an anchor or a momentum: `Merge.init` makes it from the parameters at the
start, `Merge.apply` reads and updates it. The state is a dictionary of tensors, which checkpoints can hold.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]


class Merge(Protocol):
    """A way to put a mean into the parameters.

    Attributes
    ----------
    reads_parameters : whether the result depends on the learner's parameters. If not, the mean may be formed in their
        place.
    agrees : whether all learners hold the same parameters after they merged the same mean.
    """

    reads_parameters: bool
    agrees: bool

    def init(self, x: Tensor) -> State:
        """Return the state at the start.

        Parameters
        ----------
        x : the parameters, shape (learners, numel).
        """

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Merge `mean` into every row of `x`, in place.

        Parameters
        ----------
        x : the parameters, shape (learners, numel).
        mean : shape (numel,), same dtype and device. With one learner it may be the row of `x` itself if the merge does
            not read parameters.
        state : what `init` returned, updated in place.
        rate : the local optimizer's learning rate.
        """


class Replace:
    """x = mean: the merge of all blocking algorithms.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.algorithms.merge import Replace
    >>> x = torch.zeros(1, 2)
    >>> Replace().apply(x, torch.ones(2), {}, rate=0.1)
    >>> x
    tensor([[1., 1.]])
    """

    reads_parameters = False
    agrees = True

    def init(self, x: Tensor) -> State:
        """Return no state."""
        return {}

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Copy the mean to every row, unless it was formed there."""
        if x.data_ptr() != mean.data_ptr():
            x.copy_(mean)  # x_j = mean


class Blend:
    """x = ξ x + (1 - ξ) mean (DaSGD, eq. 4).

    Parameters
    ----------
    xi : the weight ξ of the learner's own parameters, 0 to 1.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.algorithms.merge import Blend
    >>> x = torch.zeros(1, 2)
    >>> Blend(xi=0.25).apply(x, torch.ones(2), {}, rate=0.1)
    >>> x
    tensor([[0.7500, 0.7500]])
    """

    reads_parameters = True
    agrees = False

    def __init__(self, xi: float) -> None:
        self.xi = xi

    def init(self, x: Tensor) -> State:
        """Return no state."""
        return {}

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Blend every row with the mean."""
        x.mul_(self.xi).add_(mean, alpha=1 - self.xi)  # x_j = ξ x_j + (1 - ξ) mean


class OuterMomentum:
    """A step of an outer optimizer from the anchor, the result of the last merge, along Δ = anchor - mean.

    SlowMo: Wang et al. 2020, Algorithm 1. DiLoCo: Douillard et al. 2023, Algorithm 1. With ``momentum=0`` and
    ``outer_rate=1`` the result is the mean, bit for bit.

    Parameters
    ----------
    outer_rate : learning rate of the outer optimizer (α in SlowMo).
    momentum : its momentum (β in SlowMo).
    nesterov : use Nesterov's momentum, as DiLoCo does. Otherwise heavy-ball momentum, as SlowMo does.
    per_rate : keep the momentum per unit of the local learning rate γ, as SlowMo does: it then follows changes of γ.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.algorithms.merge import OuterMomentum
    >>> x = torch.zeros(1, 2)
    >>> merge = OuterMomentum(outer_rate=0.5, momentum=0.9, nesterov=False, per_rate=False)
    >>> state = merge.init(x)
    >>> merge.apply(x, torch.ones(2), state, rate=0.1)
    >>> x
    tensor([[0.5000, 0.5000]])
    """

    reads_parameters = False
    agrees = True

    def __init__(self, outer_rate: float, momentum: float, nesterov: bool, per_rate: bool) -> None:
        self.outer_rate = outer_rate
        self.momentum = momentum
        self.nesterov = nesterov
        self.per_rate = per_rate

    def init(self, x: Tensor) -> State:
        """Return the anchor and, if `momentum` is not 0, the momentum v and the local rate that v is scaled by."""
        import torch

        state = {"anchor": x[0].clone()}
        if self.momentum:
            state |= {"momentum": torch.zeros_like(x[0]), "rate": torch.zeros((), dtype=torch.float64)}
        return state

    def apply(self, x: Tensor, mean: Tensor, state: State, rate: float) -> None:
        """Step from the anchor; the result is the new anchor and every row of `x`."""
        anchor, weight = state["anchor"], self.outer_rate
        if not self.momentum or (self.per_rate and rate == 0):  # if γ is 0, γ u is 0
            anchor.lerp_(mean, weight)  # x = anchor - α Δ
        else:
            # SlowMo: u = β u + Δ/γ, x = anchor - α γ u. With v = γ u, nothing is divided by γ, which may be 0.
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
