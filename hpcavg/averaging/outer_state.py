"""The state that a merge keeps between global means: the anchor and momentum of SlowMo and DiLoCo."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hpcavg.algorithms.merge import Merge, State
from hpcavg.averaging import health
from hpcavg.averaging.flat_buffer import FlatBuffer


class OuterState:
    """The state of a merge; empty for most merges.

    It is computed from the parameters at the start, so it must be equal on all learners.

    Parameters
    ----------
    how : the merge.
    parameters : the parameters.

    Attributes
    ----------
    states : the state for every array of the parameters.
    """

    def __init__(self, how: Merge, parameters: FlatBuffer) -> None:
        self._how = how
        self._parameters = parameters
        self.start()

    def start(self) -> None:
        """Make the state anew from the current parameters."""
        self.states: list[State] = [self._how.init(array) for array in self._parameters.arrays]
        self._is_compared = False

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the state."""
        return [tensor for state in self.states for tensor in state.values()]

    def fingerprint(self) -> int:
        """Return what learners compare at the first global mean after `start`; 0 if nothing is to be compared."""
        return 0 if self._is_compared or not self.tensors else health.fingerprint(self.tensors)

    def settle(self) -> None:
        """Note that the states of all learners were compared and are equal."""
        self._is_compared = True

    def state_dict(self) -> list[dict[str, Tensor]]:
        """Return a copy of the states."""
        return [{name: tensor.clone() for name, tensor in state.items()} for state in self.states]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        """Continue from what `state_dict` returned."""
        for own, others in zip(self.states, saved, strict=True):
            for name in own:
                own[name].copy_(others[name])
        self._is_compared = False
