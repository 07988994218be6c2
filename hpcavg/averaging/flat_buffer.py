"""FlatBuffer: many tensors as views of one contiguous array per dtype.

A mean over learners is then one collective on one array, and there is nothing to pack before it or unpack after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hpcavg.errors import InputError

# Every tensor starts on a cache line, as torch's own allocations do: kernels then take the same path, bit for bit.
_ALIGNMENT_BYTES = 64

Strides = tuple[int, ...]
# The first name and all tensors of every memory.
Ties = list[tuple[str, list[Tensor]]]


class Slot(NamedTuple):
    """Where one tensor lives.

    Attributes
    ----------
    name : the tensor's name, of all its names the first.
    tensors : the tensor, and others tied to the same memory.
    array : index of the array.
    start : first element of the tensor in each row of the array.
    shape : shape of the tensor.
    strides : strides of the tensor.
    """

    name: str
    tensors: list[Tensor]
    array: int
    start: int
    shape: torch.Size
    strides: Strides


class FlatBuffer:
    """Tensors re-pointed into one contiguous array per (dtype, device).

    On a host every tensor has a storage of its own that ends where the tensor ends, over the array's memory: what saves
    or shares the tensor does so with it alone, and never with the array.

    Parameters
    ----------
    named : pairs of name and tensor. Tensors over the same memory (tied weights) take one slot. Values, shapes
        and dense strides (channels-last, say) are kept; other strides become contiguous.
    learners : rows of the arrays; the tensors are views of row 0.
    allocate : returns where an array should live: itself, or memory of its form.
    ties : what `tied` returned of them, in place of `named`.
    strides : dense ones for every slot, in place of the tensors' own.

    Attributes
    ----------
    arrays : one tensor of shape (learners, numel) per (dtype, device), in order of first appearance. Slots start on
        64-byte boundaries; the gaps between them stay zero.
    slots : one `Slot` per distinct tensor.

    Raises
    ------
    InputError
        For tensors that overlap only in part or are not yet initialised.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import FlatBuffer
    >>> weight, bias = torch.ones(3), torch.zeros(2)
    >>> buffer = FlatBuffer([("weight", weight), ("bias", bias)])
    >>> buffer.arrays[0].mul_(2).shape  # one row; each tensor starts on a 64-byte boundary
    torch.Size([1, 32])
    >>> weight
    tensor([2., 2., 2.])
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]] = (),
        learners: int = 1,
        allocate: Callable[[Tensor], Tensor] = lambda array: array,
        ties: Ties | None = None,
        strides: Sequence[Strides] | None = None,
    ) -> None:
        index_of: dict[tuple[torch.dtype, torch.device], int] = {}
        sizes: list[int] = []
        self.slots: list[Slot] = []
        for position, (name, tensors) in enumerate(tied(named) if ties is None else ties):
            first = tensors[0]
            index = index_of.setdefault((first.dtype, first.device), len(index_of))
            if index == len(sizes):
                sizes.append(0)
            own = dense_strides(first) if strides is None else strides[position]
            self.slots.append(Slot(name, tensors, index, sizes[index], first.shape, own))
            alignment = max(_ALIGNMENT_BYTES // first.element_size(), 1)
            sizes[index] += -(-first.numel() // alignment) * alignment
        self.arrays: list[Tensor] = []
        for (dtype, device), numel in zip(index_of, sizes, strict=True):
            array = torch.zeros(learners, numel, dtype=dtype, device=device)
            placed = allocate(array)
            self.arrays.append(array if placed is array else placed.zero_())
        self._take_in(self.slots)

    def _take_in(self, slots: Iterable[Slot]) -> None:
        """Copy the tensors' values into their slots, and let the slots be their memory."""
        for slot in slots:
            view = self._view(slot)
            view.copy_(slot.tensors[0].detach())
            for tensor in slot.tensors:
                tensor.data = view
        self._note_memory()

    def _note_memory(self) -> None:
        self._tensors = [tensor for slot in self.slots for tensor in slot.tensors]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))
        self._numels = list(map(Tensor.numel, self._tensors))

    def _view(self, slot: Slot) -> Tensor:
        """Return the slot's part of row 0: on a host with a storage of its own over the same memory."""
        array = self.arrays[slot.array]
        start = array.storage_offset() + slot.start
        if array.device.type != "cpu":
            return array.as_strided(slot.shape, slot.strides, start)
        size = array.element_size()
        storage = array.untyped_storage()[start * size : (start + slot.shape.numel()) * size]
        return torch.empty(0, dtype=array.dtype).set_(storage, 0, slot.shape, slot.strides)

    def view(self, slot: Slot) -> Tensor:
        """Return the slot's part of row 0, wherever its tensors are now."""
        array = self.arrays[slot.array]
        return array.as_strided(slot.shape, slot.strides, array.storage_offset() + slot.start)

    def move_to(self, arrays: list[Tensor]) -> None:
        """Let `arrays`, of the same shapes and dtypes, take the place of the arrays; values move along."""
        moved = {index for index, array in enumerate(arrays) if array is not self.arrays[index]}
        for index in moved:
            arrays[index].zero_()
        self.arrays = list(arrays)
        self._take_in(slot for slot in self.slots if slot.array in moved)

    @property
    def num_bytes(self) -> int:
        """Bytes of one learner's row over all arrays: what one learner brings into a mean."""
        return sum(array.shape[1] * array.element_size() for array in self.arrays)

    def adopt(self, successors: dict[int, Tensor]) -> None:
        """Let other tensors take the place of some, by the `id` of these; `refresh` then takes over their values."""
        for slot in self.slots:
            slot.tensors[:] = [successors.get(id(tensor), tensor) for tensor in slot.tensors]
        self._tensors = [tensor for slot in self.slots for tensor in slot.tensors]

    def refresh(self) -> None:
        """Take back tensors that were given new memory since (``p.data = ...``); values of the new memory are kept.

        Raises `InputError` naming the tensor whose shape, dtype or device is no longer the one it had.
        """
        pointers, numels = list(map(Tensor.data_ptr, self._tensors)), list(map(Tensor.numel, self._tensors))
        if pointers == self._pointers and numels == self._numels:
            return
        places, homes = zip(pointers, numels, strict=True), zip(self._pointers, self._numels, strict=True)
        is_home = (place == home for place, home in zip(places, homes, strict=True))
        for slot in self.slots:
            away = [tensor for tensor in slot.tensors if not next(is_home)]
            if not away:
                continue
            array = self.arrays[slot.array]
            then = form(slot.shape, array.dtype, array.device)
            for tensor in away:
                now = form(tensor.shape, tensor.dtype, tensor.device)
                if now != then:
                    raise InputError("model", f"{slot.name} as {now}", f"{then}, as when it was handed over")
            view = self._view(slot)
            view.copy_(away[0].detach())
            for tensor in slot.tensors:
                tensor.data = view

    def snapshot(self) -> list[Tensor]:
        """Return copies of the arrays (allocates)."""
        return [array.clone() for array in self.arrays]

    def restore(self, arrays: Iterable[Tensor]) -> None:
        """Copy `arrays`, as `snapshot` returned them, back."""
        for array, saved in zip(self.arrays, arrays, strict=True):
            array.copy_(saved)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)


def tied(named: Iterable[tuple[str, Tensor]]) -> Ties:
    """Return the first name and all tensors of every memory that the strided tensors in `named` lie in.

    Raises `InputError` for tensors that overlap only in part, as a write to one would change the other, or are not yet
    initialised.
    """
    named = list(named)
    refuse_lazy(named)
    starts = [tensor.data_ptr() or id(tensor) for _, tensor in named]  # no address where there are no elements
    if len(set(starts)) == len(named):
        ties = [(name, [tensor]) for name, tensor in named]
    else:
        found: dict[int, tuple[str, list[Tensor]]] = {}
        for (name, tensor), start in zip(named, starts, strict=True):
            first_name, same = found.setdefault(start, (name, [tensor]))
            if all(tensor is not other for other in same):
                if _layout(tensor) != _layout(same[0]):
                    raise _overlap(first_name, name)
                same.append(tensor)
        ties = list(found.values())
    _refuse_partial_overlap(ties)
    return ties


def refuse_lazy(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise `InputError` for a tensor that has no shape yet."""
    for name, tensor in named:
        if is_lazy(tensor):
            raise InputError("model", name, "a model whose lazy modules have been initialised by a forward pass")


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _refuse_partial_overlap(ties: Ties) -> None:
    filled = [index for index, (_, tensors) in enumerate(ties) if tensors[0].numel()]
    tensors = [ties[index][1][0] for index in filled]
    starts = np.fromiter(map(Tensor.data_ptr, tensors), dtype=np.uint64, count=len(tensors))
    sizes = [t.nbytes if t.is_contiguous() else span(t) * t.element_size() for t in tensors]
    order = np.argsort(starts)
    ends = starts + np.array(sizes, dtype=np.uint64)
    for place in np.flatnonzero(ends[order][:-1] > starts[order][1:]):
        one, other = order[place], order[place + 1]
        if tensors[one].device == tensors[other].device:
            raise _overlap(ties[filled[one]][0], ties[filled[other]][0])


def _overlap(name: str, next_name: str) -> InputError:
    return InputError("model", f"{name} over {next_name}", "parameters that share all of their memory or none")


def span(tensor: Tensor) -> int:
    """Return how many elements lie from the first to the last of a tensor that has some."""
    if tensor.is_contiguous():
        return tensor.numel()
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def dense_strides(tensor: Tensor) -> Strides:
    """Return the strides if they visit every element of one block once, in whatever order; else contiguous ones."""
    own = tensor.stride()
    if tensor.is_contiguous():
        return own
    expected = 1
    for stride, size in sorted(zip(own, tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return torch.empty(tensor.shape, device="meta").stride()
        expected *= size
    return own


def form(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """Return what must stay as it is of a tensor that is averaged, in words."""
    return f"{tuple(shape)} {dtype} on {device}"
