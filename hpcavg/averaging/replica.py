"""One rank's copy of the model: its tensors as flat buffers, at the start the same on every rank."""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from mpi4py import MPI
from torch import Tensor

from hpcavg.algorithms.scope import SERVER
from hpcavg.averaging import model_parts
from hpcavg.averaging.constant_buffers import Constants
from hpcavg.averaging.flat_buffer import FlatBuffer, Ties, dense_strides, form, span, tied
from hpcavg.averaging.health import digest, examine
from hpcavg.distributed.topology import Topology
from hpcavg.engines.base import Engine
from hpcavg.errors import InputError

# Tensors up to here together make one message.
_MESSAGE_BYTES = 2**24
_CHUNK_BYTES = 2**30

_UNCHANGED = "as when it was handed over; make a new Averager"


class Replica:
    """The tensors of a model, and of an optimizer over more than the model, on one rank. Collective over all ranks.

    Not averaged are frozen parameters, buffers of integers and other types that have no mean, and those that were not
    finite at the start on any rank, or so large that their sum is not, such as masks. What is averaged lives where the
    engine wants it.

    Parameters
    ----------
    start : every rank gets the values of ``"rank0"``, also of what is not averaged, or keeps its ``"own"``.

    Attributes
    ----------
    parameters : the parameters that require a gradient.
    buffers : the floating-point buffers (BatchNorm statistics).
    frozen : the dense parameters that do not require a gradient, which no training changes.

    Raises
    ------
    InputError
        On every rank, if the models differ in form or cannot be flattened, or if tensors that cannot be broadcast
        (sparse and quantized ones) differ.
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
        with _no_collection():
            self._set_up(start)

    def _set_up(self, start: str) -> None:
        topology = self._topology
        parts, trained = topology.run_on_all_ranks(self._look_up)
        self._check_same(model_parts.describe(parts, self._optimizer))
        self._check_same_contents({**parts.frozen, **parts.buffers})
        averaged = self._averaged_buffers(parts)
        self.parameters = self._flatten(trained)
        self.buffers = self._flatten(_with_numbers(tied(averaged.items())))
        topology.on_shrink(self._reallocate)
        rest = {**parts.frozen, **{name: b for name, b in parts.buffers.items() if name not in averaged}}
        plain = {id(tensor): tensor for tensor in rest.values() if model_parts.is_plain(tensor)}
        for tensor in plain.values():
            if tensor.is_conj() or tensor.is_neg():
                tensor.data = tensor.detach().resolve_conj().resolve_neg()  # nothing else can read its memory
        if start == "rank0":
            for array in (*self.parameters.arrays, *self.buffers.arrays):
                self._broadcast([array])
            # Empty ones have nothing to say, and NumPy's view of a tensor would keep it from being resized.
            for batch in _batches(tensor for tensor in plain.values() if tensor.numel()):
                self._broadcast(batch)
        self._constants = Constants(self.buffers, self._same_as_rank_0s(start))
        self.frozen = [tensor for tensor in parts.frozen.values() if id(tensor) in plain]
        self._frozen = parts.frozen
        self._known = {**parts.parameters, **averaged}
        self._averaged_names = set(averaged)
        self._fleeting = parts.fleeting
        self._left_alone = {name for name in parts.buffers if name not in averaged}
        self._remember()

    # -- the same on all ranks ------------------------------------------------------------------------------------

    def _look_up(self) -> tuple[model_parts.Parts, Ties]:
        """Return what there is, and where the trained parameters lie."""
        model_parts.refuse_wrapped(self._model)
        parts = model_parts.look_up(self._model, self._optimizer)
        model_parts.check(parts)
        tied((name, buffer) for name, buffer in parts.buffers.items() if model_parts.is_averaged_buffer(buffer))
        return parts, tied(parts.trained.items())

    def _check_same(self, own: list[tuple[object, ...]]) -> None:
        all_ranks, rank = self._topology.all_ranks, self._topology.rank
        digests = all_ranks.allgather(hashlib.sha256(repr(own).encode()).digest())
        if len(set(digests)) == 1:
            return
        first = all_ranks.bcast(own, root=0)
        error = None
        if own != first:
            here, there = next(
                (pair for pair in zip(own, first, strict=False) if pair[0] != pair[1]),
                (f"{len(own)} tensors", f"{len(first)} tensors"),
            )
            error = InputError("model", f"{here} on rank {rank}", f"{there}, as on rank 0")
        self._topology.raise_everywhere(error)

    def _check_same_contents(self, named: Mapping[str, Tensor]) -> None:
        """Raise `InputError` on every rank where a tensor that cannot be broadcast is not the same on all."""
        own = {name: digest(model_parts.contents(name, t)) for name, t in named.items() if not model_parts.is_plain(t)}
        told = self._topology.all_ranks.allgather(own)
        for rank, other in enumerate(told):
            for name, value in other.items():
                if value != told[0][name]:
                    kind = "quantized" if named[name].is_quantized else f"{named[name].layout}"
                    raise InputError("model", f"{name} ({kind}) on rank {rank}", "the same as on rank 0 from the start")

    def _averaged_buffers(self, parts: model_parts.Parts) -> dict[str, Tensor]:
        """Return the buffers of which means are taken: those of real numbers whose sum is finite with all ranks'.

        One that is still empty is left alone: whoever fills it resizes it, which shared memory does not bear.
        """
        found = {name: t for name, t in parts.buffers.items() if model_parts.is_averaged_buffer(t) and t.numel()}
        looks = (examine([tensor], self._topology.num_learners) for tensor in found.values())
        can_be_summed = np.array([is_finite and not is_large for is_finite, is_large in looks], dtype=np.uint8)
        self._topology.all_ranks.Allreduce(MPI.IN_PLACE, can_be_summed, MPI.MIN)
        return {name: tensor for (name, tensor), can in zip(found.items(), can_be_summed, strict=True) if can}

    def _flatten(self, ties: Ties) -> FlatBuffer:
        """Return the tensors as a flat buffer, in which each lies as rank 0's does. Collective over all ranks."""
        all_ranks = self._topology.all_ranks
        strides = [dense_strides(tensors[0]) for _, tensors in ties]
        if len(set(all_ranks.allgather(hashlib.sha256(repr(strides).encode()).digest()))) > 1:
            strides = all_ranks.bcast(strides, root=0)
        return FlatBuffer(allocate=self._engine.allocate, ties=ties, strides=strides)

    def _reallocate(self) -> None:
        for flat in (self.parameters, self.buffers):
            flat.move_to([self._engine.allocate(array) for array in flat.arrays])

    def _broadcast(self, tensors: list[Tensor]) -> None:
        """Give every rank rank 0's values of `tensors`, in one message if they are small."""
        parts = [_as_bytes(tensor) for tensor in tensors]
        is_packed = len(parts) > 1
        packed = torch.cat(parts) if is_packed else parts[0]
        for chunk in packed.split(_CHUNK_BYTES):
            self._topology.all_ranks.Bcast(chunk.numpy(), root=0)
        if self._topology.rank:
            for tensor, values in zip(tensors, packed.split([len(part) for part in parts]), strict=True):
                aligned = values.clone() if is_packed else values
                _put(aligned.view(tensor.dtype).view(tensor.shape), tensor)

    def _same_as_rank_0s(self, start: str) -> list[bool]:
        """Return for each slot of the buffers but the last whether it holds rank 0's values. Collective."""
        slots = self.buffers.slots[:-1]
        if start == "rank0":
            return [True] * len(slots)
        first = self.buffers.snapshot()
        for array in first:
            self._broadcast([array])
        parts = [(slot.array, slice(slot.start, slot.start + slot.shape.numel())) for slot in slots]
        return [torch.equal(self.buffers.arrays[array][0, part], first[array][0, part]) for array, part in parts]

    # -- still the same -------------------------------------------------------------------------------------------

    def refresh(self) -> None:
        """Look up all tensors by name, and take back those that are elsewhere than in the flat buffers.

        A buffer that was reassigned (``self.b = new``) is taken in with its values, as is memory that was exchanged
        (``p.data = new``). Raises `InputError` that names the tensor where one is another or another form of it, where
        it is gone, new, or unfrozen: the flat buffers would not be the model any more.
        """
        if any(self._empty) or self._objects() != self._seen or any(map(_REQUIRES_GRAD, self._frozen.values())):
            self._look_again()
        self.parameters.refresh()
        self.buffers.refresh()
        self._constants.mark()

    def _remember(self) -> None:
        """Note by which dictionaries the model's tensors are found, and what is in them."""
        modules = list(self._model.modules())
        parts: list[dict[str, Any]] = [
            part for module in modules for part in (module._modules, module._parameters, module._buffers)
        ]
        self._full, self._empty = [part for part in parts if part], [part for part in parts if not part]
        self._seen = self._objects()
        self._kept_alive = (modules, self._optimized())  # so that no address is used again

    def _optimized(self) -> list[Tensor]:
        return list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))

    def _objects(self) -> bytes:
        """Return the addresses of all that the dictionaries and the optimizer hold: a look at many costs little."""
        values: Iterable[Any] = chain.from_iterable(part.values() for part in self._full)
        return np.fromiter(chain(values, self._optimized()), dtype=object).tobytes()

    def _look_again(self) -> None:
        """Adopt buffers that were reassigned; refuse all else that is no longer what it was."""
        parts = model_parts.look_up(self._model, self._optimizer)
        found = {**parts.parameters, **parts.buffers}
        adopted: dict[int, Tensor] = {}
        for name, then in list(self._known.items()):
            now = found.get(name)
            if now is then:
                continue
            is_buffer = name in self._averaged_names
            if is_buffer and now is not None and _form(now) == _form(then):
                adopted[id(then)] = now
            elif is_buffer and (name in parts.fleeting or (now is None and name in self._fleeting)):
                self._let_go(name)
            else:
                is_other = now is not None and _form(now) == _form(then)
                wanted = "there" if now is None else "the same tensor (assign=False)" if is_other else _form(then)
                raise InputError("model", name, f"{wanted}, {_UNCHANGED}")
        for name, then in self._known.items():
            if found[name] is not adopted.get(id(then), then):
                raise InputError("model", name, f"one tensor under all its names, {_UNCHANGED}")
        self._refuse_new(parts)
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                allowed = "frozen as when it was handed over; unfreeze before making the Averager"
                raise InputError("model", name, allowed)
        self.buffers.adopt(adopted)
        self._known = {name: adopted.get(id(then), then) for name, then in self._known.items()}
        self._remember()

    def _let_go(self, name: str) -> None:
        """Leave a buffer alone from now on: its slot stays, that of nobody."""
        del self._known[name]
        self._averaged_names.remove(name)
        self._left_alone.add(name)

    def _refuse_new(self, parts: model_parts.Parts) -> None:
        known = set(map(id, self._known.values()))
        for name, tensor in parts.parameters.items():
            if id(tensor) not in known:
                option = "optimizer" if name.startswith("optimizer.") and name not in self._known else "model"
                raise InputError(option, name, f"a parameter {_UNCHANGED}")
        for name, tensor in parts.buffers.items():
            is_new = name not in self._known and name not in self._left_alone and name not in parts.fleeting
            if is_new and model_parts.is_averaged_buffer(tensor):
                raise InputError("model", name, f"a buffer {_UNCHANGED}")

    def share_buffers(self) -> None:
        """Give every rank the buffers of rank 0: servers have none of their own. Collective over all ranks."""
        with self._topology.waiting("buffers of the learners", SERVER):
            for array in self.buffers.arrays:
                self._broadcast([array])

    def put_back_constants(self) -> None:
        """Give buffers that no learner has changed the bits that they had, once a mean of the buffers was merged."""
        self._constants.put_back()

    def name_non_finite(self) -> str:
        """Return the name of the first averaged tensor that is not finite here; an empty one where all are."""
        for flat in (self.parameters, self.buffers):
            for slot in flat:
                if not flat.view(slot).isfinite().all():
                    return slot.name
        return ""

    # -- copies -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the model's state in which every tensor is contiguous and has memory of its own."""
        return {name: _copy(value) for name, value in self._model.state_dict().items()}

    def snapshot(self) -> tuple[list[Tensor], list[Tensor], dict[str, Tensor]]:
        """Return copies of all tensors that training changes, for `restore`."""
        self.refresh()
        others = {
            name: buffer.detach().clone()
            for name, buffer in self._model.named_buffers()
            if name not in self._averaged_names and model_parts.is_plain(buffer)
        }
        return self.parameters.snapshot(), self.buffers.snapshot(), others

    def restore(self, saved: tuple[list[Tensor], list[Tensor], dict[str, Tensor]]) -> None:
        """Give all tensors what they held at the `snapshot`, also those that were exchanged since."""
        self.refresh()
        parameters, buffers, others = saved
        self.parameters.restore(parameters)
        self.buffers.restore(buffers)
        for name, buffer in self._model.named_buffers():
            if name in others and _form(buffer) == _form(others[name]):
                _put(others[name], buffer)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let Python look for no garbage: of many objects that all stay, it would look at each again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _with_numbers(ties: Ties) -> Ties:
    """Return `ties` and, after them, a number for each in the array of the first; see `Constants`."""
    if not ties:
        return ties
    first = ties[0][1][0]
    return [*ties, ("", [torch.ones(len(ties), dtype=first.dtype, device=first.device)])]


def _form(tensor: Tensor) -> str:
    return form(tensor.shape, tensor.dtype, tensor.device)


def _copy(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if not model_parts.is_plain(value):
        return value.detach().clone()
    return value.detach().clone(memory_format=torch.contiguous_format)


def _batches(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists of up to the size of a message, or of one."""
    batch: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and num_bytes + size > _MESSAGE_BYTES:
            yield batch
            batch, num_bytes = [], 0
        batch.append(tensor)
        num_bytes += size
    if batch:
        yield batch


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the values in the order of their indices, on the host: the tensor's own memory where it has that order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def _put(values: Tensor, tensor: Tensor) -> None:
    """Make `values` those of `tensor`, which gets new memory where elements of it lie over each other."""
    if values.data_ptr() == tensor.data_ptr() and tensor.numel():
        return
    with torch.no_grad():
        if tensor.numel() and span(tensor) < tensor.numel():
            if not torch.equal(values, tensor):
                tensor.data = values.clone()
        else:
            tensor.copy_(values)
