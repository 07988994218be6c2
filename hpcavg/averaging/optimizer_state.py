"""The local optimizers' state (momentum, Adam's moments) at a global mean: kept, averaged, or reset."""

from __future__ import annotations

import numpy as np
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.merge import replace
from hpcavg.algorithms.scope import GLOBAL
from hpcavg.averaging.flat_buffer import FlatBuffer, dense_strides, one_learner
from hpcavg.averaging.local_optimizer import LocalOptimizer
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means


class StateAverager:
    """Averages the optimizer's state tensors that have their parameter's shape, over all learners.

    A parameter's state is averaged if every learner has it: if a gradient was None so far, there is none. Step counters
    are not averaged. The state tensors become views of a flat buffer, made anew if their set changes.

    Parameters
    ----------
    optimizer : the local optimizer.
    topology : the learners.
    learners : see `FlatBuffer`.

    Attributes
    ----------
    flat : holds the averaged state.
    """

    def __init__(self, optimizer: LocalOptimizer, topology: Topology, learners: int | None) -> None:
        self._optimizer = optimizer
        self._learners = learners
        self._topology = topology
        self._names: list[str] = []
        self._tensors: dict[tuple[int, str], Tensor] = {}
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
            self._optimizer.clear()
        return 0

    def average(self, engine: Engine) -> int:
        """Average the state in place; return its bytes. Collective over all learners."""
        means = self._topology.run_collective(lambda: self._take(engine), what="average of the optimizer's state")
        for array, mean in zip(self.flat.arrays, means, strict=True):
            replace.apply(array, mean, {}, 0.0)
        self._optimizer.put(self._tensors)
        return self.flat.num_bytes

    def _take(self, engine: Engine) -> list[Tensor]:
        """Return the means of the flat buffer's arrays."""
        found = self._optimizer.tensors()
        common = self._common(found)
        self._tensors = {key: tensor for key, tensor in found.items() if key[0] in common}
        tensors = {f"{index}.{name}": tensor for (index, name), tensor in self._tensors.items()}
        if list(tensors) != self._names or any(
            slot.tensors[0] is not tensor for slot, tensor in zip(self.flat, tensors.values(), strict=True)
        ):
            # The state's order of memory may differ between ranks; the parameters' does not.
            parameters = self._optimizer.parameters
            strides = [dense_strides(one_learner(parameters[index], self._learners)) for index, _ in self._tensors]
            self.flat = FlatBuffer(tensors.items(), self._learners, strides=strides)
            self._names = list(tensors)
        self.flat.refresh()
        return take_means(engine, self.flat.arrays, GLOBAL, self._topology.survives, exact=True)

    def _common(self, found: dict[tuple[int, str], Tensor]) -> set[int]:
        """Return the indices of the parameters that have state on every learner. Collective over all learners."""
        present = np.zeros(len(self._optimizer.parameters), dtype=np.uint8)
        present[[index for index, _ in found]] = 1
        self._topology.learner_ranks.Allreduce(MPI.IN_PLACE, present, MPI.MIN)
        return set(np.flatnonzero(present).tolist())
