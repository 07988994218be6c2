"""One rank's copy of the model, in flat buffers."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging import model_parts
from hpcavg.averaging.constant_buffers import Constants
from hpcavg.averaging.flat_buffer import FlatBuffer, Ties, dense_strides, one_learner, tied
from hpcavg.averaging.health import examine
from hpcavg.averaging.known_tensors import KnownTensors, form_of
from hpcavg.averaging.same_start import broadcast, check_same_contents, check_same_form, in_messages, put
from hpcavg.averaging.stacked import Stacked
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.errors import InputError


class Replica:
    """The tensors of a model and an optimizer on one rank. Its construction is collective over all ranks.

    Some tensors are not averaged: frozen parameters, buffers of integers and other types without a mean, and buffers
    that are not finite at the start on any rank or whose sum may overflow, such as masks of -inf.

    Parameters
    ----------
    model : the model.
    optimizer : the optimizer.
    topology : all ranks.
    engine : allocates the memory of what is averaged.
    start : ``"rank0"``: every rank starts with rank 0's values, also of tensors that are not averaged. ``"own"``: every
        rank keeps its values.

    Attributes
    ----------
    parameters : the parameters that require a gradient.
    buffers : the averaged buffers (BatchNorm statistics), and one more tensor for `Constants`.
    frozen : the dense parameters that do not require a gradient.

    Raises
    ------
    InputError
        On every rank, if the models differ in form, a model cannot be flattened, or sparse or quantized tensors, which
        cannot be broadcast, differ.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        topology: Topology,
        engine: Engine,
        start: str = "rank0",
    ) -> None:
        self._model = model
        self._optimizer = optimizer
        self._topology = topology
        self._engine = engine
        self._learners = model.learners if isinstance(model, Stacked) else None
        with _no_collection():
            self._set_up(start)

    # -- set-up ---------------------------------------------------------------------------------------------------

    def _set_up(self, start: str) -> None:
        topology = self._topology
        parts, trained = topology.run_on_all_ranks(self._look_up)
        check_same_form(model_parts.describe(parts, self._optimizer), topology)
        check_same_contents({**parts.frozen, **parts.buffers}, topology)
        averaged = self._averaged_buffers(parts)
        self.parameters = self._flatten(trained)
        self.buffers = self._flatten(self._with_marks(averaged))
        topology.on_shrink(self._reallocate)
        rest = {**parts.frozen, **{name: b for name, b in parts.buffers.items() if name not in averaged}}
        plain = {id(tensor): tensor for tensor in rest.values() if model_parts.is_plain(tensor)}
        for tensor in plain.values():
            if tensor.is_conj() or tensor.is_neg():
                tensor.data = tensor.detach().resolve_conj().resolve_neg()  # NumPy cannot read lazy conjugates
        if start == "rank0":
            for array in (*self.parameters.arrays, *self.buffers.arrays):
                broadcast([array[:1]], topology)
                array[1:] = array[0]
            # Empty tensors are left out: a NumPy view of a tensor would prevent resizing it.
            for message in in_messages(tensor for tensor in plain.values() if tensor.numel()):
                broadcast(message, topology)
            for tensor in plain.values() if self._learners is not None else ():
                tensor.data[1:] = tensor.data[0]
        self._constants = Constants(self.buffers, self._equal_to_rank_0(start))
        self.frozen = [tensor for tensor in parts.frozen.values() if id(tensor) in plain]
        self._known = KnownTensors(self._model, self._optimizer, parts, averaged)

    def _look_up(self) -> tuple[model_parts.Parts, Ties]:
        """Return all tensors, and the trained parameters by memory. Raises `InputError` for what cannot be averaged."""
        model_parts.refuse_wrapped(self._model)
        parts = model_parts.look_up(self._model, self._optimizer)
        model_parts.check(parts)
        others = parts.parameters.keys() - dict(self._model.named_parameters(remove_duplicate=False)).keys()
        if others and self._learners is not None:
            raise InputError("optimizer", min(others), "of the model's parameters, which have an axis of learners")
        averaged = {name: buffer for name, buffer in parts.buffers.items() if model_parts.is_averaged_buffer(buffer)}
        tied(averaged.items(), self._learners)
        return parts, tied(parts.trained.items(), self._learners)

    def _averaged_buffers(self, parts: model_parts.Parts) -> dict[str, Tensor]:
        """Return the buffers that are averaged: of real numbers, finite on all ranks, with a finite sum. Collective.

        Empty buffers are left out: a module resizes them later, and shared memory cannot be resized.
        """
        found = {name: t for name, t in parts.buffers.items() if model_parts.is_averaged_buffer(t) and t.numel()}
        looks = (examine([tensor], self._topology.num_learners) for tensor in found.values())
        can_be_summed = np.array([is_finite and not is_large for is_finite, is_large in looks], dtype=np.uint8)
        self._topology.all_ranks.Allreduce(MPI.IN_PLACE, can_be_summed, MPI.MIN)
        return {name: tensor for (name, tensor), can in zip(found.items(), can_be_summed, strict=True) if can}

    def _flatten(self, ties: Ties) -> FlatBuffer:
        """Return the tensors as a flat buffer with rank 0's order of memory. Collective over all ranks."""
        all_ranks = self._topology.all_ranks
        strides = [dense_strides(one_learner(tensors[0], self._learners)) for _, tensors in ties]
        if len(set(all_ranks.allgather(hashlib.sha256(repr(strides).encode()).digest()))) > 1:
            strides = all_ranks.bcast(strides, root=0)
        return FlatBuffer(learners=self._learners, allocate=self._engine.allocate, ties=ties, strides=strides)

    def _with_marks(self, averaged: dict[str, Tensor]) -> Ties:
        """Return the buffers by memory, and one more tensor, which holds a mark for each of them; see `Constants`."""
        ties = tied(averaged.items(), self._learners)
        if not ties:
            return ties
        first = ties[0][1][0]
        axis = () if self._learners is None else (self._learners,)
        return [*ties, ("", [torch.ones(*axis, len(ties), dtype=first.dtype, device=first.device)])]

    def _reallocate(self) -> None:
        for flat in (self.parameters, self.buffers):
            flat.move_to([self._engine.allocate(array) for array in flat.arrays])

    def _equal_to_rank_0(self, start: str) -> list[bool]:
        """Return for every buffer whether it is equal to rank 0's. Collective over all ranks."""
        slots = self.buffers.slots[:-1]
        if start == "rank0":
            return [True] * len(slots)
        first = self.buffers.snapshot()
        for array in first:
            broadcast([array[:1]], self._topology)
        parts = [(slot.array, slice(slot.start, slot.start + slot.shape.numel())) for slot in slots]
        return [
            all(torch.equal(row[part], first[array][0, part]) for row in self.buffers.arrays[array])
            for array, part in parts
        ]

    # -- during the run -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Bring the flat buffers up to date with the model. Called before every mean.

        Buffers that were reassigned (``module.b = new``) and tensors with new memory (``p.data = new``) become views of
        the flat buffers again, with their new values.

        Raises
        ------
        InputError
            Names a tensor that is new, gone or unfrozen, or whose shape, dtype or device is another.
        """
        if self._known.may_differ():
            self.buffers.adopt(self._known.look_again())
        self.parameters.refresh()
        self.buffers.refresh()
        self._constants.mark()

    def share_buffers(self) -> None:
        """Give every rank the buffers of rank 0: servers compute none. Collective over all ranks."""
        with self._topology.waiting("buffers of the learners", SERVER):
            for array in self.buffers.arrays:
                broadcast([array[:1]], self._topology)
                array[1:] = array[0]

    def put_back_constants(self) -> None:
        """Restore the bits of buffers that no learner has changed, after a mean of the buffers was merged."""
        self._constants.put_back()

    def name_non_finite(self) -> str:
        """Return the name of the first averaged tensor that is not finite on this rank; "" if all are finite."""
        for flat in (self.parameters, self.buffers):
            for slot in flat:
                if not flat.view(slot).isfinite().all():
                    return slot.name if self._learners is None else slot.name.removeprefix("module.")
        return ""

    # -- copies -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the first learner's state, whose tensors are contiguous and share no memory."""
        model = self._model
        state = model.state_dict_of(0) if isinstance(model, Stacked) else model.state_dict()
        return {name: _copy(value) for name, value in state.items()}

    def snapshot(self) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return copies of all tensors that training changes, for `restore`."""
        self.refresh()
        others = {
            name: buffer.detach().clone()
            for name, buffer in self._model.named_buffers()
            if name not in self._known.averaged_names and model_parts.is_plain(buffer)
        }
        return self.parameters.snapshot(), self.buffers.snapshot(), others

    def restore(self, saved: tuple[list[Tensor], list[Tensor], dict[str, Tensor]]) -> None:
        """Restore the values that `snapshot` returned, also of tensors that were exchanged since."""
        self.refresh()
        parameters, buffers, others = saved
        self.parameters.restore(parameters)
        self.buffers.restore(buffers)
        for name, buffer in self._model.named_buffers():
            if name in others and form_of(buffer) == form_of(others[name]):
                put(others[name], buffer)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch Python's garbage collector off: it would scan the many new objects again and again, all of which stay."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not model_parts.is_plain(value):
        return value.detach().clone()
    return value.detach().clone(memory_format=torch.contiguous_format)
