"""One optimizer for the learners of a rank, with the arithmetic of an optimizer each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, optim

from hpcavg.averaging.local_optimizer import NUMBERS, LocalOptimizer, tensors_of

# What they do to an element depends on nothing but this element's gradient and state, and on `NUMBERS`.
_ELEMENTWISE = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam),
    *(optim.RMSprop, optim.Rprop, optim.Adagrad, optim.Adadelta, optim.ASGD),
)


class StackedOptimizer(LocalOptimizer):
    """The optimizer of a rank with several learners, whose parameters are stacked.

    An elementwise optimizer steps for all at once. Any other is split into one for each learner. So is one that counts
    steps, as soon as learners have taken different numbers of them.

    Parameters
    ----------
    optimizer : the optimizer of the stacked parameters. Its options and hooks count, also while it is split.
    learners : number of learners, R.
    own_pace : learners may take different numbers of steps.
    """

    def __init__(self, optimizer: optim.Optimizer, learners: int, own_pace: bool) -> None:
        super().__init__(optimizer)
        self._learners = learners
        # The fused kernels of a CPU need parameters without gaps between the learners.
        is_fused = any(group.get("fused") for group in optimizer.param_groups)
        self._must_split = own_pace or is_fused or type(optimizer) not in _ELEMENTWISE
        self._split = self._parts() if self._must_split else []
        self._has_forgotten = False  # since the last step

    def step(
        self,
        rows: Collection[int],
        scaler: torch.amp.GradScaler | None = None,
        closure: Callable[[], float] | None = None,
    ) -> None:
        """Take the step of the learners in these rows; see `LocalOptimizer.step`."""
        self._has_forgotten = False
        if not self._split:
            super().step(rows)
            return
        for row in rows:
            self._follow(row)
            self._split[row].step()
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # or schedulers warn that it took no step

    # -- the state, of all learners -------------------------------------------------------------------------------

    def clear(self) -> None:
        """Drop the state of all learners."""
        super().clear()
        self._split = self._parts() if self._must_split else []

    def forget(self, rows: Collection[int]) -> None:
        """Drop the state of the learners in these rows, which were sick, and set their gradients to zero."""
        index = list(rows)
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad[index] = 0
        if not self._split and self.optimizer.state and not self._starts_from_zero:
            self._split = self._parts()
            self.optimizer.state.clear()
        for row in rows if self._split else ():
            self._split[row].state.clear()
        for tensor in self.tensors().values() if not self._split else ():
            tensor[index] = 0
        self._has_forgotten = True

    @property
    def _starts_from_zero(self) -> bool:
        """Whether a state of zero is as good as none: the first gradient has the same weight as the next ones."""
        groups = self.optimizer.param_groups
        return type(self.optimizer) is optim.SGD and not any(group["dampening"] for group in groups)

    def tensors(self) -> dict[tuple[int, str], Tensor]:
        """Return the state that all learners have and that can be averaged, by parameter index and name.

        Its tensors have shape (learners, ...).
        """
        if not self._split:
            return {} if self._has_forgotten else tensors_of(self.optimizer)
        of_rows = [tensors_of(optimizer) for optimizer in self._split]
        common = [key for key in of_rows[0] if all(key in each for each in of_rows)]
        return {key: torch.stack([each[key] for each in of_rows]) for key in common}

    def put(self, tensors: Mapping[tuple[int, str], Tensor]) -> None:
        """Take the values of what `tensors` returned, which have changed."""
        for row, optimizer in enumerate(self._split):
            own = tensors_of(optimizer)
            for key, tensor in tensors.items():
                own[key].copy_(tensor[row])

    # -- the state, of one learner --------------------------------------------------------------------------------

    def state_dict_of(self, row: int) -> dict[str, Any]:
        """Return the ``state_dict`` that a learner's optimizer has on a rank of its own."""
        if self._split:
            self._follow(row)
        return (self._split[row] if self._split else self._part(row)).state_dict()

    def load_state_dicts(self, states: Sequence[dict[str, Any]]) -> None:
        """Give every learner's optimizer the state that `state_dict_of` returned."""
        self.optimizer.state.clear()
        split = self._parts()
        for optimizer, state in zip(split, states, strict=True):
            optimizer.load_state_dict(state)
        for group, loaded in zip(self.optimizer.param_groups, split[0].param_groups, strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})
        joined = None if self._must_split else _join([_states(optimizer) for optimizer in split])
        self._split = split if joined is None else []
        if joined is not None:
            self.optimizer.state.update(
                {parameter: state for parameter, state in zip(self.parameters, joined, strict=True) if state}
            )

    # -- one optimizer for each learner ---------------------------------------------------------------------------

    def _parts(self) -> list[optim.Optimizer]:
        return [self._part(row) for row in range(self._learners)]

    def _part(self, row: int) -> optim.Optimizer:
        """Return an optimizer of one learner, with a copy of its state."""
        whole = self.optimizer
        part: optim.Optimizer = object.__new__(type(whole))
        # A scheduler gives the whole optimizer an attribute, its method bound to it.
        part.__dict__.update({name: value for name, value in whole.__dict__.items() if name != "step"})
        part.param_groups = [
            {**group, "params": [parameter.detach()[row] for parameter in group["params"]]}
            for group in whole.param_groups
        ]
        part.state = defaultdict(dict)
        own = (parameter for group in part.param_groups for parameter in group["params"])
        for parameter, of_row in zip(self.parameters, own, strict=True):
            if parameter in whole.state:
                part.state[of_row] = {
                    name: _part_of(name, value, row) for name, value in whole.state[parameter].items()
                }
        return part

    def _follow(self, row: int) -> None:
        """Give a learner's optimizer the options, memory and gradients that the whole one has by now."""
        for group, own in zip(self.optimizer.param_groups, self._split[row].param_groups, strict=True):
            own.update({name: value for name, value in group.items() if name != "params"})
            for parameter, of_row in zip(group["params"], own["params"], strict=True):
                of_row.data = parameter.detach()[row]
                of_row.grad = None if parameter.grad is None else parameter.grad[row]


def _part_of(name: str, value: Any, row: int) -> Any:
    """Return a copy of a learner's part of a value in the state."""
    if not isinstance(value, Tensor):
        return value
    return value.clone() if name in NUMBERS else value[row].clone()


def _states(optimizer: optim.Optimizer) -> list[dict[str, Any]]:
    """Return the state of every parameter, in their order."""
    return [optimizer.state.get(parameter, {}) for group in optimizer.param_groups for parameter in group["params"]]


def _join(of_learners: Sequence[Sequence[dict[str, Any]]]) -> list[dict[str, Any]] | None:
    """Return the state of all learners for every parameter; None if they have not taken the same numbers of steps."""
    joined: list[dict[str, Any]] = []
    for states in zip(*of_learners, strict=True):
        if any(state.keys() != states[0].keys() for state in states):
            return None
        whole: dict[str, Any] = {}
        for name, first in states[0].items():
            values = [state[name] for state in states]
            if isinstance(first, Tensor) and name not in NUMBERS:
                whole[name] = torch.stack(values)
            elif all(value == first for value in values):
                whole[name] = first
            else:
                return None
        joined.append(whole)
    return joined
