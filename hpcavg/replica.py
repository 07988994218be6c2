"""One rank's copy of the model: its tensors as flat buffers, at the start the same on every rank."""

from __future__ import annotations

import torch
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.flat import FlatBuffer
from hpcavg.mean import Engine
from hpcavg.topology import Topology


class Replica:
    """The tensors of a model, and of an optimizer over more than the model, on one rank. Collective over everyone.

    Every rank gets rank 0's values, those of frozen parameters and integer buffers included. What is averaged lives
    where the engine wants it.

    Attributes
    ----------
    parameters : those that require a gradient. buffers : the floating-point ones (BatchNorm statistics).
    frozen : the parameters that do not require one, which no training changes.

    Raises `InputError` on every rank where the models differ in form or cannot be flattened.
    """

    def __init__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, topology: Topology, engine: Engine
    ) -> None:
        self._topology = topology
        self.parameters, self.buffers = topology.do_together(lambda: _flatten(model, optimizer))
        self._optimizer = optimizer
        self._num_optimized = _count(optimizer)
        self._frozen = [(name, p) for name, p in model.named_parameters() if not p.requires_grad]
        self.frozen: list[Tensor] = [parameter for _, parameter in self._frozen]
        unaveraged = [*self._frozen, *((name, b) for name, b in model.named_buffers() if not b.is_floating_point())]
        self._check_same(unaveraged)
        self._engine = engine
        self._go_home()
        topology.on_renewal(self._go_home)
        for tensor in (*self.parameters.arrays, *self.buffers.arrays, *(tensor for _, tensor in unaveraged)):
            self._broadcast(tensor)

    def _go_home(self) -> None:
        for flat in (self.parameters, self.buffers):
            flat.move_to([self._engine.home(array) for array in flat.arrays])

    def check_frozen(self) -> None:
        """Raise `InputError` where parameters were unfrozen, or added to the optimizer, since the replica was made."""
        if _count(self._optimizer) != self._num_optimized:
            given = f"{_count(self._optimizer)} parameters"
            raise InputError("optimizer", given, f"{self._num_optimized}, as when it was handed over; add them before")
        for name, parameter in self._frozen:
            if parameter.requires_grad:
                raise InputError(
                    "model", name, "frozen as when it was handed over; unfreeze before making the Averager"
                )

    def _check_same(self, unaveraged: list[tuple[str, Tensor]]) -> None:
        topology = self._topology
        own = self.parameters.signature() + self.buffers.signature()
        own += [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in unaveraged]
        first = topology.everyone.bcast(own, root=0)
        error = None
        if own != first:
            here, there = next(
                (pair for pair in zip(own, first, strict=False) if pair[0] != pair[1]),
                (f"{len(own)} tensors", f"{len(first)} tensors"),
            )
            error = InputError("model", f"{here} on rank {topology.rank}", f"{there}, as on rank 0")
        topology.agree(error)

    def _broadcast(self, tensor: Tensor) -> None:
        """Give every rank rank 0's values of `tensor`."""
        host = tensor.detach().cpu().reshape(-1).view(torch.uint8)
        for chunk in host.split(2**30):
            self._topology.everyone.Bcast(chunk.numpy(), root=0)
        if host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host.view(tensor.dtype).view(tensor.shape))


def _count(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)


def _flatten(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> tuple[FlatBuffer, FlatBuffer]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for index, group in enumerate(optimizer.param_groups):
        named += [(f"optimizer.{index}.{i}", p) for i, p in enumerate(group["params"]) if p.requires_grad]
    buffers = [(name, b) for name, b in model.named_buffers() if b.is_floating_point()]
    return FlatBuffer(named), FlatBuffer(buffers)
