"""Gradients packed into a flat buffer, for the baseline that averages them instead of parameters."""

from __future__ import annotations

from collections.abc import Callable
from zlib import crc32

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.calls import Call, Meeting
from hpcavg.flat import FlatBuffer
from hpcavg.mean import Engine, WireFormat, take_means
from hpcavg.mean.arrays import Values
from hpcavg.merge import replace
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
        self._engine = engine
        self._go_home()
        topology.on_renewal(self._go_home)
        self.num_bytes = self._flat.num_bytes

    def average(self, scope: Scope, wire_format: WireFormat | None, meet: Callable[[int], Meeting], call: Call) -> None:
        """Replace every learner's gradients by their mean over `scope`. Collective over the scope.

        meet : meets the others in `call`, with a fingerprint.
        """
        means, present = self._topology.carry_out(lambda: self._take(scope, wire_format, meet), scope, call)
        for array, mean in zip(self._flat.arrays, means, strict=True):
            replace.apply(array, mean, {}, 0.0)
        for tensor, packed, is_present in zip(self._tensors, self._flat, present, strict=True):
            if is_present:
                tensor.grad = packed.view

    def _go_home(self) -> None:
        self._flat.move_to([self._engine.home(array) for array in self._flat.arrays])

    def _take(
        self, scope: Scope, wire_format: WireFormat | None, meet: Callable[[int], Meeting]
    ) -> tuple[list[Tensor], Values]:
        """Return the means of the arrays, and which tensors have a gradient on any learner."""
        present = np.array([tensor.grad is not None for tensor in self._tensors], dtype=np.uint8)
        for tensor, packed in zip(self._tensors, self._flat, strict=True):
            if tensor.grad is None:
                packed.view.zero_()
            elif tensor.grad.data_ptr() != packed.view.data_ptr():
                packed.view.copy_(tensor.grad)
        # Nearly always the learners have gradients of the same tensors, and need not tell each other which.
        if len(set(meet(crc32(present.tobytes())).fingerprints)) > 1:
            self._topology.comm(scope).Allreduce(MPI.IN_PLACE, present, MPI.MAX)
        means = take_means(self._engine, self._flat.arrays, scope, self._topology.survives, wire_format)
        return means, present
