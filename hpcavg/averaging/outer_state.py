"""What merges keep from one global mean to the next: SlowMo's and DiLoCo's anchor and momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpcavg.algorithms.merge import Merge, State
from hpcavg.averaging import health
from hpcavg.averaging.flat_buffer import FlatBuffer


class OuterState:
    """The state of a merge for every array of the parameters; most merges have none.

    It follows from the parameters that all learners start with, so it must be the same on all of them.

    Attributes
    ----------
    states : one for every array.
    """

    def __init__(self, how: Merge, parameters: FlatBuffer) -> None:
        self._how = how
        self._parameters = parameters
        self.start()

    def start(self) -> None:
        """Start from the parameters as they are now."""
        self.states: list[State] = [self._how.init(array) for array in self._parameters.arrays]
        self._is_compared = False

    @property
    def tensors(self) -> list[Tensor]:
        """All of it."""
        return [tensor for state in self.states for tensor in state.values()]

    def fingerprint(self) -> int:
        """Return what learners compare at the first global mean after a start; 0 where there is nothing to compare."""
        return 0 if self._is_compared or not self.tensors else health.fingerprint(self.tensors)

    def settle(self) -> None:
        """Note that all learners have the same."""
        self._is_compared = True

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Return a copy."""
        return [{name: tensor.clone() for name, tensor in state.items()} for state in self.states]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Continue from what `state_dict` returned."""
        for own, others in zip(self.states, saved, strict=True):
            for name in own:
                own[name].copy_(others[name])
        self._is_compared = False
