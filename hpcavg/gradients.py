"""Gradients packed into a flat buffer, for the baseline that averages them instead of parameters."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI

from hpcavg.flat import FlatBuffer
from hpcavg.mean import Engine, WireFormat
from hpcavg.schedule import Scope
from hpcavg.topology import Topology


class GradientBuffer:
    """Packs ``p.grad`` of every parameter, averages them, and points ``p.grad`` at the means.

    A gradient that is None on some learners counts as zero there; one that is None on all of them stays None, so that
    weight decay and momentum leave its parameter alone, as they would on one process.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology, engine: Engine) -> None:
        self._tensors = [tensor for slot in parameters for tensor in slot.tensors]
        self._topology = topology
        self._flat = FlatBuffer((str(index), torch.zeros_like(t)) for index, t in enumerate(self._tensors))
        self._flat.move_to([engine.home(array) for array in self._flat.arrays])
        self._engine = engine
        self.num_bytes = self._flat.num_bytes

    def average(self, scope: Scope, wire_format: WireFormat | None = None) -> None:
        """Replace every learner's gradients by their mean over `scope`. Collective over the scope."""
        present = np.array([tensor.grad is not None for tensor in self._tensors], dtype=np.uint8)
        for tensor, packed in zip(self._tensors, self._flat, strict=True):
            if tensor.grad is None:
                packed.view.zero_()
            elif tensor.grad.data_ptr() != packed.view.data_ptr():
                packed.view.copy_(tensor.grad)
        self._topology.comm(scope).Allreduce(MPI.IN_PLACE, present, MPI.MAX)
        for array in self._flat.arrays:
            self._engine.mean(array, array[0], scope, wire_format)
        for tensor, packed, is_present in zip(self._tensors, self._flat, present, strict=True):
            if is_present:
                tensor.grad = packed.view
