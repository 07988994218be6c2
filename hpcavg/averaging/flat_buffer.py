"""FlatBuffer: many tensors as views of one contiguous array per dtype.

A mean over learners is then one collective per array, without packing and unpacking.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from hpcavg.engines.reduction import as_array
from hpcavg.errors import InputError

# Every tensor starts on a cache line, like torch's own allocations: kernels then give the same bits.
_ALIGNMENT_BYTES = 64

Strides = tuple[int, ...]
# For each memory, the first name and all tensors that share it.
Ties = list[tuple[str, list[Tensor]]]


class Slot(NamedTuple):
    """The place of one tensor in a flat buffer.

    Attributes
    ----------
    name : the tensor's first name.
    tensors : the tensor, and the tensors tied to it.
    array : index of the array.
    start : first element of the tensor in each row of the array.
    shape : shape of one learner's tensor.
    strides : strides of it.
    """

    name: str
    tensors: list[Tensor]
    array: int
    start: int
    shape: torch.Size
    strides: Strides


class FlatBuffer:
    """Tensors that become views of one contiguous array per (dtype, device).

    Values, shapes and dense strides, such as channels-last, are kept. Other strides become contiguous. Tied tensors
    take one slot. On a host, every tensor has a storage of its own over the array's memory: saving or sharing a tensor
    includes nothing of the others.

    Parameters
    ----------
    named : pairs of name and tensor.
    learners : the tensors' first axis is that of so many learners, each of which has a row of the arrays. None: the
        tensors have no such axis, and the arrays have one row.
    allocate : maps an array to the memory in which it should live: the array itself, or another of the same form.
    ties : what `tied` returned, instead of `named`.
    strides : dense strides for every slot, instead of the tensors' own.

    Attributes
    ----------
    learners : as given.
    arrays : one tensor of shape (learners, numel) per (dtype, device), in order of first appearance. Slots start on
        64-byte boundaries. The gaps between them stay zero.
    values : the same memory as NumPy arrays, whose calls take less time; in half precision and on devices, the tensors.
    num_bytes : bytes of one learner in all arrays: what it brings into a mean.
    slots : a `Slot` for every distinct tensor. Iterating over the flat buffer yields them.

    Raises
    ------
    InputError
        If tensors overlap in part, or a lazy module is not initialised.

    Examples
    --------
    >>> import torch
    >>> from hpcavg import FlatBuffer
    >>> weight, bias = torch.ones(3), torch.zeros(2)
    >>> buffer = FlatBuffer([("weight", weight), ("bias", bias)])
    >>> buffer.arrays[0].mul_(2).shape  # one learner; two tensors of up to 16 elements each
    torch.Size([1, 32])
    >>> weight
    tensor([2., 2., 2.])
    >>> buffer.num_bytes
    128
    >>> saved = buffer.snapshot()
    >>> weight.zero_()
    tensor([0., 0., 0.])
    >>> buffer.restore(saved)
    >>> weight
    tensor([2., 2., 2.])
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]] = (),
        learners: int | None = None,
        allocate: Callable[[Tensor], Tensor] = lambda array: array,
        ties: Ties | None = None,
        strides: Sequence[Strides] | None = None,
    ) -> None:
        self.learners = learners
        index_of: dict[tuple[torch.dtype, torch.device], int] = {}
        sizes: list[int] = []
        self.slots: list[Slot] = []
        for position, (name, tensors) in enumerate(tied(named, learners) if ties is None else ties):
            first = one_learner(tensors[0], learners)
            index = index_of.setdefault((first.dtype, first.device), len(index_of))
            if index == len(sizes):
                sizes.append(0)
            own = dense_strides(first) if strides is None else strides[position]
            self.slots.append(Slot(name, tensors, index, sizes[index], first.shape, own))
            alignment = max(_ALIGNMENT_BYTES // first.element_size(), 1)
            sizes[index] += -(-first.numel() // alignment) * alignment
        arrays = []
        for (dtype, device), numel in zip(index_of, sizes, strict=True):
            array = torch.zeros(learners or 1, numel, dtype=dtype, device=device)
            placed = allocate(array)
            arrays.append(array if placed is array else placed.zero_())
        self._keep(arrays)
        self.num_bytes = sum(array.shape[1] * array.element_size() for array in arrays)
        self._take_in(self.slots)

    def _keep(self, arrays: Iterable[Tensor]) -> None:
        self.arrays = list(arrays)
        self.values = list(map(as_array, self.arrays))

    def _take_in(self, slots: Iterable[Slot]) -> None:
        """Copy the tensors' values into the slots, and make the tensors views of the slots."""
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
        """Return `view`; on a host and without an axis of learners, with a storage of its own over the same memory."""
        array = self.arrays[slot.array]
        if self.learners is not None or array.device.type != "cpu":
            return self.view(slot)
        start = array.storage_offset() + slot.start
        size = array.element_size()
        storage = array.untyped_storage()[start * size : (start + slot.shape.numel()) * size]
        return torch.empty(0, dtype=array.dtype).set_(storage, 0, slot.shape, slot.strides)

    def view(self, slot: Slot) -> Tensor:
        """Return the slot's part of the array, even if its tensors have other memory by now."""
        array = self.arrays[slot.array]
        shape, strides = slot.shape, slot.strides
        if self.learners is not None:
            shape, strides = torch.Size((self.learners, *shape)), (array.stride(0), *strides)
        return array.as_strided(shape, strides, array.storage_offset() + slot.start)

    def move_to(self, arrays: list[Tensor]) -> None:
        """Move the tensors to other arrays, with their values.

        Parameters
        ----------
        arrays : of the same shapes and dtypes as `arrays`.
        """
        moved = {index for index, array in enumerate(arrays) if array is not self.arrays[index]}
        for index in moved:
            arrays[index].zero_()
        self._keep(arrays)
        self._take_in(slot for slot in self.slots if slot.array in moved)

    def adopt(self, successors: dict[int, Tensor]) -> None:
        """Exchange tensors for others of the same form. The next `refresh` makes them views, with their values.

        Parameters
        ----------
        successors : the new tensors, by the `id` of the former ones.
        """
        for slot in self.slots:
            slot.tensors[:] = [successors.get(id(tensor), tensor) for tensor in slot.tensors]
        self._tensors = [tensor for slot in self.slots for tensor in slot.tensors]

    def refresh(self) -> None:
        """Make tensors that got new memory (``p.data = new``) views of the arrays again, with their new values.

        Raises
        ------
        InputError
            Names a tensor whose shape, dtype or device has changed.
        """
        pointers, numels = list(map(Tensor.data_ptr, self._tensors)), list(map(Tensor.numel, self._tensors))
        if pointers == self._pointers and numels == self._numels:
            return
        now, before = zip(pointers, numels, strict=True), zip(self._pointers, self._numels, strict=True)
        is_in_place = (one == other for one, other in zip(now, before, strict=True))
        for slot in self.slots:
            moved = [tensor for tensor in slot.tensors if not next(is_in_place)]
            if not moved:
                continue
            view = self._view(slot)
            wanted = form(view.shape, view.dtype, view.device)
            for tensor in moved:
                given = form(tensor.shape, tensor.dtype, tensor.device)
                if given != wanted:
                    raise InputError("model", f"{slot.name} as {given}", f"{wanted}, as when it was handed over")
            view.copy_(moved[0].detach())
            for tensor in slot.tensors:
                tensor.data = view

    def snapshot(self) -> list[Tensor]:
        """Return copies of the arrays, for `restore`."""
        return [array.clone() for array in self.arrays]

    def restore(self, arrays: Iterable[Tensor]) -> None:
        """Restore the values that `snapshot` returned."""
        for array, saved in zip(self.arrays, arrays, strict=True):
            array.copy_(saved)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)


def one_learner(tensor: Tensor, learners: int | None) -> Tensor:
    """Return the first learner's part of `tensor`; `learners` None: it has no axis of learners."""
    return tensor if learners is None else tensor.detach()[0]


def tied(named: Iterable[tuple[str, Tensor]], learners: int | None = None) -> Ties:
    """Return, for every memory of the dense tensors in `named`, the first name and all tensors that share it.

    Parameters
    ----------
    named : pairs of name and tensor.
    learners : see `FlatBuffer`.

    Raises
    ------
    InputError
        If tensors overlap in part (a write to one would change a part of the other), or a lazy module is not
        initialised.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.averaging.flat_buffer import tied
    >>> weight = torch.ones(2)
    >>> [(name, len(tensors)) for name, tensors in tied([("first", weight), ("second", weight.view(2))])]
    [('first', 2)]
    """
    named = list(named)
    refuse_lazy(named)
    starts = [tensor.data_ptr() or id(tensor) for _, tensor in named]  # empty tensors have no address
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
    # The rows of several learners alternate in memory, so only those of the first one are compared.
    _refuse_partial_overlap([(name, one_learner(tensors[0], learners)) for name, tensors in ties])
    return ties


def refuse_lazy(named: Iterable[tuple[str, Tensor]]) -> None:
    """Raise `InputError` if a tensor of a lazy module has no shape yet."""
    for name, tensor in named:
        if is_lazy(tensor):
            raise InputError("model", name, "a model whose lazy modules have been initialised by a forward pass")


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return (tensor.device, tensor.dtype, tensor.shape, tensor.stride())


def _refuse_partial_overlap(named: Iterable[tuple[str, Tensor]]) -> None:
    named = [(name, tensor) for name, tensor in named if tensor.numel()]
    starts = np.fromiter((tensor.data_ptr() for _, tensor in named), dtype=np.uint64, count=len(named))
    sizes = [t.nbytes if t.is_contiguous() else span(t) * t.element_size() for _, t in named]
    order = np.argsort(starts)
    ends = starts + np.array(sizes, dtype=np.uint64)
    for place in np.flatnonzero(ends[order][:-1] > starts[order][1:]):
        (name, one), (next_name, other) = named[order[place]], named[order[place + 1]]
        if one.device == other.device:
            raise _overlap(name, next_name)


def _overlap(name: str, next_name: str) -> InputError:
    return InputError("model", f"{name} over {next_name}", "parameters that share all of their memory or none")


def span(tensor: Tensor) -> int:
    """Return the number of elements in memory from the first to the last of `tensor`, which is not empty."""
    if tensor.is_contiguous():
        return tensor.numel()
    return sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1


def dense_strides(tensor: Tensor) -> Strides:
    """Return the tensor's strides if it is dense (a block without gaps, in any order), else contiguous strides."""
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
    """Return what may not change of an averaged tensor, in words."""
    return f"{tuple(shape)} {dtype} on {device}"
