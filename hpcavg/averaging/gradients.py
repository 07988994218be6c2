"""Means of gradients instead of parameters, for synchronous SGD."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.merge import replace
from hpcavg.algorithms.scope import Scope
from hpcavg.averaging.calls import Call, Meeting
from hpcavg.averaging.flat_buffer import FlatBuffer
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine, take_means
from hpcavg.engines.reduction import Values
from hpcavg.errors import InputError

_NONE, _DENSE, _SPARSE = range(3)


def _kind(gradient: Tensor | None) -> int:
    if gradient is None:
        return _NONE
    return _DENSE if gradient.layout is torch.strided else _SPARSE


class GradientBuffer:
    """Averages ``p.grad`` of every parameter, packed into a flat buffer.

    A gradient that is None on some learners counts as zero there. A gradient that is None on all learners stays None:
    weight decay and momentum then leave the parameter alone, as on one process.

    Parameters
    ----------
    parameters : the parameters.
    topology : the learners.
    engine : takes the means.

    Attributes
    ----------
    num_bytes : bytes of one learner's gradients.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology, engine: Engine) -> None:
        self._names = [slot.name for slot in parameters for _ in slot.tensors]
        self._tensors = [tensor for slot in parameters for tensor in slot.tensors]
        self._topology = topology
        self._packed = list(map(torch.zeros_like, self._tensors))
        named = zip(self._names, self._packed, strict=True)
        self._flat = FlatBuffer(named, parameters.learners, allocate=engine.allocate)
        self._engine = engine
        topology.on_shrink(self._reallocate)
        self.num_bytes = self._flat.num_bytes

    def average(self, scope: Scope, meet: Callable[[int], Meeting], call: Call) -> None:
        """Replace every learner's gradients by their mean over `scope`. Collective over the scope.

        Parameters
        ----------
        scope : the learners that take part.
        meet : meets them with a fingerprint.
        call : identifies the collective.

        Raises
        ------
        InputError
            On every learner of the scope, if a gradient is sparse on one.
        """
        means, present = self._topology.run_collective(lambda: self._take(scope, meet), scope, call)
        for array, mean in zip(self._flat.arrays, means, strict=True):
            replace.apply(array, mean, {}, 0.0)
        for tensor, packed, is_present in zip(self._tensors, self._packed, present, strict=True):
            if is_present:
                tensor.grad = packed

    def _reallocate(self) -> None:
        self._flat.move_to([self._engine.allocate(array) for array in self._flat.arrays])

    def _take(self, scope: Scope, meet: Callable[[int], Meeting]) -> tuple[list[Tensor], Values]:
        """Return the means of the arrays, and for each tensor whether any learner has a gradient."""
        gradients = [tensor.grad for tensor in self._tensors]
        present = np.array([_kind(gradient) for gradient in gradients], dtype=np.uint8)
        # Nearly always, the learners have gradients of the same tensors, and no exchange is needed.
        if len(set(meet(crc32(present.tobytes())).fingerprints)) > 1:
            self._topology.comm(scope).Allreduce(MPI.IN_PLACE, present, MPI.MAX)
        for index in np.flatnonzero(present == _SPARSE):
            raise InputError("model", self._names[index], "of a dense gradient (sparse=False): gradients are averaged")
        self._flat.refresh()
        for gradient, packed in zip(gradients, self._packed, strict=True):
            if gradient is None:
                packed.zero_()
            elif gradient is not packed:
                packed.copy_(gradient)
        means = take_means(self._engine, self._flat.arrays, scope, self._topology.survives)
        return means, present
