"""Gradients packed into a flat buffer, for the baseline that averages them instead of parameters."""

from __future__ import annotations

import numpy as np
import torch
from mpi4py import MPI

from hpcavg.flat import FlatBuffer
from hpcavg.mean import Engine
from hpcavg.schedule import Scope
from hpcavg.topology import Topology


class GradientBuffer:
    """Packs ``p.grad`` of every parameter, averages them, and points ``p.grad`` at the means.

    A gradient that is None on some learners counts as zero there; one that is None on all of them stays None, so that
    weight decay and momentum leave its parameter alone, as they would on one process.
    """

    def __init__(self, parameters: FlatBuffer, topology: Topology) -> None:
        self._slots = list(parameters)
        self._topology = topology
        self._flat = FlatBuffer([(slot.name, torch.zeros_like(slot.view)) for slot in self._slots])
        self.num_bytes = self._flat.num_bytes

    def average(self, engine: Engine, scope: Scope) -> None:
        """Replace every learner's gradients by their mean over `scope`. Collective over the scope."""
        present = np.zeros(len(self._slots), dtype=np.uint8)
        for index, (slot, packed) in enumerate(zip(self._slots, self._flat, strict=True)):
            gradients = [p.grad for p in slot.tensors if p.grad is not None]
            present[index] = bool(gradients)
            if not gradients:
                packed.view.zero_()
            elif gradients[0].data_ptr() != packed.view.data_ptr():
                packed.view.copy_(gradients[0])
        self._topology.comm(scope).Allreduce(MPI.IN_PLACE, present, MPI.MAX)
        for array in self._flat.arrays:
            engine.mean(array, array[0], scope)
        for index, (slot, packed) in enumerate(zip(self._slots, self._flat, strict=True)):
            if present[index]:
                slot.tensors[0].grad = packed.view
