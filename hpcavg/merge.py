"""HOW: what a learner does with a mean. In place, on flat buffers of shape (learners, numel).

A `Merge` may keep state between means (an anchor, a momentum): `init` makes it from the starting parameters, `apply`
reads and updates it. The state is a dictionary of tensors, so a checkpoint can hold it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Merge(Protocol):
    """One way of putting a mean into the parameters."""

    overwrites: bool
    """True if the result is the mean itself, whatever the parameters were: it may then be formed in their place."""

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """Return the state that goes with parameters `x`, shape (learners, numel)."""

    def apply(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> None:
        """Merge `mean`, shape (numel,), into every row of `x`."""


class Replace:
    """x = mean: what every blocking algorithm of the five papers does."""

    overwrites = True

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """Keep nothing."""
        return {}

    def apply(self, x: Tensor, mean: Tensor, state: dict[str, Tensor]) -> None:
        """Copy the mean into every row; free of cost where it was formed in place."""
        x.copy_(mean)  # x_j = mean


replace = Replace()
