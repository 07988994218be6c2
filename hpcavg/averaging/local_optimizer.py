"""The local optimizer of a rank, as means need it: its steps, its rate, and its state."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

# State that depends on how many steps the optimizer has taken, and has not the parameter's shape.
NUMBERS = frozenset(("step", "mu_product", "eta", "mu"))


class LocalOptimizer:
    """The optimizer of a rank with one learner.

    Parameters
    ----------
    optimizer : the optimizer.

    Attributes
    ----------
    optimizer : as given.
    """

    def __init__(self, optimizer: optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, in the order of the groups."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(
        self,
        rows: Collection[int],
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], float] | None = None,
    ) -> None:
        """Take the step of the learners in these rows. The parameters are those of `hpcavg.Averager.step`."""
        if scaler is not None:
            scaler.step(self.optimizer)
        elif closure is not None:
            self.optimizer.step(closure)
        else:
            self.optimizer.step()

    # -- the state, of all learners -------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop the state of all learners."""
        self.optimizer.state.clear()

    def forget(self, rows: Collection[int]) -> None:
        """Drop the state of the learners in these rows, which were sick, and set their gradients to zero.

        Gradients become zero, not None: the optimizer may still take its step with them.
        """
        self.clear()
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def tensors(self) -> dict[tuple[int, str], Tensor]:
        """Return the state that can be averaged, by parameter index and name."""
        return tensors_of(self.optimizer)

    def put(self, tensors: Mapping[tuple[int, str], Tensor]) -> None:
        """Take the values of what `tensors` returned, which have changed."""

    # -- the state, of one learner --------------------------------------------------------------------------------

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return the ``state_dict`` that a learner's optimizer has on a rank of its own."""
        return self.optimizer.state_dict()

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Give every learner's optimizer the state that `state_dict_of` returned."""
        (state,) = states
        self.optimizer.load_state_dict(state)


def tensors_of(optimizer: optim.Optimizer) -> dict[tuple[int, str], Tensor]:
    """Return the state tensors that have their parameter's shape, and a mean, by parameter index and name."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        (index, name): value
        for index, parameter in enumerate(parameters)
        for name, value in sorted(optimizer.state.get(parameter, {}).items())
        if isinstance(value, Tensor) and value.shape == parameter.shape and name not in NUMBERS and _has_mean(value)
    }


def _has_mean(value: Tensor) -> bool:
    return value.layout is torch.strided and (value.is_floating_point() or value.is_complex())
