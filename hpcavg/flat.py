"""FlatBuffer: many tensors as views of one contiguous array per dtype.

A mean over learners is then one collective on one array, and there is nothing to pack before it or unpack after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcavg.errors import InputError

# Every tensor starts on a cache line, as torch's own allocations do: kernels then take the same path, bit for bit.
_ALIGNMENT_BYTES = 64


@dataclass(frozen=True)
class Slot:
    """Where one tensor lives.

    Attributes
    ----------
    name : the tensor's name, of all its names the first.
    tensors : the tensor, and others tied to the same memory.
    view : the part of the flat array that they now are, for learner 0.
    """

    name: str
    tensors: tuple[Tensor, ...]
    view: Tensor


class FlatBuffer:
    """Tensors re-pointed into one contiguous array per (dtype, device).

    Parameters
    ----------
    named : pairs of name and tensor. Tensors over the same memory (tied weights) take one slot. Values, shapes
        and dense strides (channels-last, say) are kept; other strides become contiguous.
    learners : rows of the arrays; the tensors are views of row 0.

    Attributes
    ----------
    arrays : one tensor of shape (learners, numel) per (dtype, device), in order of first appearance. Slots start on
        64-byte boundaries; the gaps between them stay zero.
    slots : one `Slot` per distinct tensor.

    Raises `InputError` for tensors that overlap only in part or are not yet initialised.
    """

    def __init__(self, named: Iterable[tuple[str, Tensor]], learners: int = 1) -> None:
        tied: dict[tuple[object, ...], list[tuple[str, Tensor]]] = {}
        for name, tensor in named:
            if torch.nn.parameter.is_lazy(tensor):
                raise InputError("model", name, "a model whose lazy modules have been initialised by a forward pass")
            same = tied.setdefault(_memory_of(tensor), [])
            if all(tensor is not other for _, other in same):
                same.append((name, tensor))
        _refuse_partial_overlap([entries[0] for entries in tied.values()])
        sizes: dict[tuple[torch.dtype, torch.device], int] = {}
        offsets: list[int] = []
        for entries in tied.values():
            tensor = entries[0][1]
            key = (tensor.dtype, tensor.device)
            alignment = max(_ALIGNMENT_BYTES // tensor.element_size(), 1)
            offsets.append(sizes.get(key, 0))
            sizes[key] = offsets[-1] + -(-tensor.numel() // alignment) * alignment
        by_key = {
            (dtype, device): torch.zeros(learners, numel, dtype=dtype, device=device)
            for (dtype, device), numel in sizes.items()
        }
        self.arrays = list(by_key.values())
        self.slots: list[Slot] = []
        for entries, offset in zip(tied.values(), offsets, strict=True):
            name, tensor = entries[0]
            array = by_key[tensor.dtype, tensor.device]
            strides = tensor.stride() if _is_dense(tensor) else _contiguous_strides(tensor.shape)
            view = array.as_strided(tensor.shape, strides, offset)
            view.copy_(tensor.detach())
            self.slots.append(Slot(name, tuple(t for _, t in entries), view))
        self._point_into_arrays()

    def _point_into_arrays(self) -> None:
        for slot in self.slots:
            for tensor in slot.tensors:
                tensor.data = slot.view

    def move_to(self, arrays: list[Tensor]) -> None:
        """Let `arrays`, of the same shapes and dtypes, take the place of the arrays; values move along."""
        homes = {}
        for old, new in zip(self.arrays, arrays, strict=True):
            if new is not old:
                new.copy_(old)
            homes[old.dtype, old.device] = (old, new)
        moved = []
        for slot in self.slots:
            old, new = homes[slot.view.dtype, slot.view.device]
            offset = slot.view.storage_offset() - old.storage_offset() + new.storage_offset()
            view = new.as_strided(slot.view.shape, slot.view.stride(), offset)
            moved.append(Slot(slot.name, slot.tensors, view))
        self.arrays, self.slots = list(arrays), moved
        self._point_into_arrays()

    @property
    def num_bytes(self) -> int:
        """Bytes of one learner's row over all arrays: what one learner brings into a mean."""
        return sum(array.shape[1] * array.element_size() for array in self.arrays)

    def signature(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Return (name, shape, dtype) of every slot: equal on all learners, or they cannot be averaged."""
        return [(slot.name, tuple(slot.view.shape), str(slot.view.dtype)) for slot in self.slots]

    def refresh(self) -> None:
        """Take back tensors that were given new memory since (``p.data = ...``); values of the new memory are kept.

        Raises `InputError` naming the tensor whose shape, dtype or device is no longer the one it had.
        """
        for slot in self.slots:
            for tensor in slot.tensors:
                if tensor.data_ptr() == slot.view.data_ptr() and tensor.shape == slot.view.shape:
                    continue
                now, then = _form(tensor), _form(slot.view)
                if now != then:
                    raise InputError("model", f"{slot.name} as {now}", f"{then}, as when it was handed over")
                slot.view.copy_(tensor.detach())
                for other in slot.tensors:
                    other.data = slot.view

    def snapshot(self) -> list[Tensor]:
        """Return copies of the arrays (allocates)."""
        return [array.clone() for array in self.arrays]

    def restore(self, arrays: Iterable[Tensor]) -> None:
        """Copy `arrays`, as `snapshot` returned them, back."""
        for array, saved in zip(self.arrays, arrays, strict=True):
            array.copy_(saved)

    def __iter__(self) -> Iterator[Slot]:
        return iter(self.slots)


def _memory_of(tensor: Tensor) -> tuple[object, ...]:
    """Return a key that two tensors share exactly when they are the same elements in the same order."""
    if tensor.numel() == 0:
        return (id(tensor),)
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _refuse_partial_overlap(entries: list[tuple[str, Tensor]]) -> None:
    """Raise `InputError` where two different tensors lie over each other: a write to one would change the other."""
    ranges = []
    for name, tensor in entries:
        if tensor.numel():
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            start = tensor.data_ptr()
            ranges.append((str(tensor.device), start, start + span * tensor.element_size(), name))
    ranges.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in itertools.pairwise(ranges):
        if device == next_device and start < end:
            raise InputError("model", f"{name} over {next_name}", "parameters that share all of their memory or none")


def _is_dense(tensor: Tensor) -> bool:
    """Return whether the strides visit every element of one block once, in whatever order of dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return True


def _contiguous_strides(shape: torch.Size) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in reversed(range(len(shape) - 1)):
        strides[dim] = strides[dim + 1] * max(shape[dim + 1], 1)
    return tuple(strides)


def _form(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
