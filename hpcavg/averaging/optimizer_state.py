"""The local optimizers' state (momentum, Adam's moments) at a global mean: kept, averaged, or reset."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.merge import replace
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging.flat_buffer import FlatBuffer, dense_strides
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means


def forget(optimizer: torch.optim.Optimizer) -> None:
    """Drop the state of the optimizer, and set all gradients to zero, after a learner was sick.

    Gradients become zero, not None: the optimizer may still take its step with them.
    """
    optimizer.state.clear()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.zero_()


class StateAverager:
    """Averages the optimizer's state tensors that have their parameter's shape, over all learners.

    A parameter's state is averaged if every learner has it: if a gradient was None so far, there is none. Step counters
    are not averaged. The state tensors become views of a flat buffer, made anew if their set changes.

    Parameters
    ----------
    optimizer : the local optimizer.
    topology : the learners.

    Attributes
    ----------
    flat : holds the averaged state.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, topology: Topology) -> None:
        self._optimizer = optimizer
        self._topology = topology
        self._names: list[str] = []
        self.flat = FlatBuffer([])

    def treat(self, policy: str, engine: Engine) -> int:
        """Keep, average or reset the state at a global mean; return the bytes averaged. Collective over all learners.

        Parameters
        ----------
        policy : ``"keep"``, ``"average"`` or ``"reset"``.
        engine : takes the means.
        """
        if policy == "average":
            return self.average(engine)
        if policy == "reset":
            self._optimizer.state.clear()
        return 0

    def average(self, engine: Engine) -> int:
        """Average the state in place; return its bytes. Collective over all learners."""
        means = self._topology.run_collective(lambda: self._take(engine), what="average of the optimizer's state")
        for array, mean in zip(self.flat.arrays, means, strict=True):
            replace.apply(array, mean, {}, 0.0)
        return self.flat.num_bytes

    def _take(self, engine: Engine) -> list[Tensor]:
        """Return the means of the flat buffer's arrays."""
        found = self._tensors()
        common = self._common(found)
        tensors = {f"{index}.{name}": tensor for (index, name), tensor in found.items() if index in common}
        if list(tensors) != self._names or any(
            slot.tensors[0] is not tensor for slot, tensor in zip(self.flat, tensors.values(), strict=True)
        ):
            # The state's order of memory may differ between ranks; the parameters' does not.
            parameters = self._parameters()
            strides = [dense_strides(parameters[index]) for index, _ in found if index in common]
            self.flat, self._names = FlatBuffer(tensors.items(), strides=strides), list(tensors)
        self.flat.refresh()
        return take_means(engine, self.flat.arrays, GLOBAL, self._topology.survives, exact=True)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def _tensors(self) -> dict[tuple[int, str], Tensor]:
        """Return the state tensors that can be averaged, by parameter index and name."""
        return {
            (index, name): value
            for index, parameter in enumerate(self._parameters())
            for name, value in sorted(self._optimizer.state.get(parameter, {}).items())
            if isinstance(value, Tensor) and value.shape == parameter.shape and name != "step" and _has_mean(value)
        }

    def _common(self, found: dict[tuple[int, str], Tensor]) -> set[int]:
        """Return the indices of the parameters that have state on every learner. Collective over all learners."""
        present = np.zeros(len(self._parameters()), dtype=np.uint8)
        present[[index for index, _ in found]] = 1
        self._topology.learner_ranks.Allreduce(MPI.IN_PLACE, present, MPI.MIN)
        return set(np.flatnonzero(present).tolist())


def _has_mean(value: Tensor) -> bool:
    return value.layout is torch.strided and (value.is_floating_point() or value.is_complex())
