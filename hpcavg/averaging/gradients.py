"""Gradients packed into a flat buffer, for the baseline that averages them instead of parameters."""

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
    """Packs ``p.grad`` of every parameter, averages them, and points ``p.grad`` at the means.

    A gradient that is None on some learners counts as zero there; one that is None on all of them stays None, so that
    weight decay and momentum leave its parameter alone, as they would on one process. `average` raises `InputError` on
    every learner of the scope for a gradient that is sparse on one.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology, engine: Engine) -> None:
        named = [(slot.name, tensor) for slot in parameters for tensor in slot.tensors]
        self._names = [name for name, _ in named]
        self._tensors = [tensor for _, tensor in named]
        self._topology = topology
        self._packed = list(map(torch.zeros_like, self._tensors))
        self._flat = FlatBuffer(zip(self._names, self._packed, strict=True), allocate=engine.allocate)
        self._engine = engine
        topology.on_shrink(self._reallocate)
        self.num_bytes = self._flat.num_bytes

    def average(self, scope: Scope, meet: Callable[[int], Meeting], call: Call) -> None:
        """Replace every learner's gradients by their mean over `scope`. Collective over the scope.

        meet : meets the others in `call`, with a fingerprint.
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
        """Return the means of the arrays, and which tensors have a gradient on any learner."""
        gradients = [tensor.grad for tensor in self._tensors]
        present = np.array([_kind(gradient) for gradient in gradients], dtype=np.uint8)
        # Nearly always the learners have gradients of the same tensors, and need not tell each other which.
        if len(set(meet(crc32(present.tobytes())).fingerprints)) > 1:
            self._topology.comm(scope).Allreduce(MPI.IN_PLACE, present, MPI.MAX)
        for index in np.flatnonzero(present == _SPARSE):
            raise InputError("model", self._names[index], "of a dense gradient (sparse=False) where these are averaged")
        self._flat.refresh()
        for gradient, packed in zip(gradients, self._packed, strict=True):
            if gradient is None:
                packed.zero_()
            elif gradient is not packed:
                packed.copy_(gradient)
        means = take_means(self._engine, self._flat.arrays, scope, self._topology.survives)
        return means, present
