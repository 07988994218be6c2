"""All calls of engines to CUDA. Tests replace them by calls on ordinary memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

# cudaHostRegisterPortable: page-locked for every CUDA context of the process.
_PORTABLE = 1


class Mark(Protocol):
    """A position in the queue of a stream."""

    def synchronize(self) -> None:
        """Wait until all work before it is done."""


class Cuda:
    """Devices, copies, streams and page-locked memory. "The stream" is torch's current stream."""

    def identity(self, device: torch.device | int) -> str:
        """Return what distinguishes a visible GPU from all others of its node, the same in every process."""
        properties = torch.cuda.get_device_properties(device)
        return str(getattr(properties, "uuid", None) or getattr(properties, "pci_bus_id", device))

    def holds(self, array: Tensor) -> bool:
        """Return whether `array` is in device memory."""
        return array.is_cuda

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between host and device or within the device. If host memory is not page-locked, this waits."""
        target.copy_(source, non_blocking=True)

    def to_device(self, values: Tensor, device: torch.device) -> Tensor:
        """Return a copy of host memory on `device`."""
        return values.to(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for all work in the stream, before MPI reads its results."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def mark(self, device: torch.device) -> Mark | None:
        """Return the current end of the stream's queue; None for the CPU, which has no queue."""
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Make `device` the current device inside the block: torch passes only memory of the current device to MPI."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield

    @contextmanager
    def own_stream(self, device: torch.device) -> Iterator[None]:
        """Use a new stream inside the block, and wait for its work at the end. For threads beside the training."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield
            torch.cuda.current_stream(device).synchronize()

    # -- host memory ----------------------------------------------------------------------------------------------

    def pinned(self, form: Tensor) -> Tensor:
        """Allocate and return page-locked host memory with the shape and dtype of `form`."""
        return torch.empty(form.shape, dtype=form.dtype, pin_memory=True)

    def page_lock(self, host: Tensor, owner: object) -> None:
        """Page-lock `host` in place during the lifetime of `owner`, which must keep `host`. Raises `RuntimeError`."""
        if host.numel() == 0:
            return
        address, num_bytes = host.data_ptr(), host.numel() * host.element_size()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE))
        # Unlock before the memory is unmapped: otherwise a later mapping at the same address cannot be locked.
        weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, address).atexit = False
