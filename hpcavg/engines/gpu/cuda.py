"""The calls to CUDA that engines make, all of them: tests let ordinary memory stand in for a GPU's here."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.multiprocessing import reductions

# cudaHostRegisterPortable: page-locked for every CUDA context of the process.
_PORTABLE = 1
# Where `reduce_tensor` keeps the exporting rank's device number, and whether to wait for an event of its stream.
_DEVICE, _WAITS_FOR_EVENT = 6, -1


class Mark(Protocol):
    """A place in a stream's queue of work."""

    def synchronize(self) -> None:
        """Wait until the work before it is done."""


class Cuda:
    """Copies, streams, page-locked memory and memory of other processes. "The stream" is torch's current one."""

    def holds(self, array: Tensor) -> bool:
        """Return whether `array` lies in a GPU's memory."""
        return array.is_cuda

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue a copy between host and device or within the device; host memory must be page-locked to stay queued."""
        target.copy_(source, non_blocking=True)

    def to_device(self, values: Tensor, device: torch.device) -> Tensor:
        """Return a copy of host memory on `device`."""
        return values.to(device)

    def synchronize(self, device: torch.device) -> None:
        """Wait for all that is queued in the stream: before MPI or another process looks at what it wrote."""
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()

    def mark(self, device: torch.device) -> Mark | None:
        """Return the place that the stream's queue has reached; None on the CPU, where nothing is queued."""
        if device.type != "cuda":
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(device))
        return event

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Make `device` the current one inside the block: torch hands memory to MPI from the current device only."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device):
            yield

    @contextmanager
    def own_stream(self, device: torch.device) -> Iterator[None]:
        """Work in a stream of its own inside the block, all of it done at the end; for threads beside the training."""
        if device.type != "cuda":
            yield
            return
        with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
            yield
            torch.cuda.current_stream(device).synchronize()

    # -- host memory ----------------------------------------------------------------------------------------------

    def pinned(self, form: Tensor) -> Tensor:
        """Return page-locked host memory of the shape and dtype of `form` (allocates)."""
        return torch.empty(form.shape, dtype=form.dtype, pin_memory=True)

    def page_lock(self, host: Tensor, owner: object) -> None:
        """Page-lock `host` where it lies, as long as `owner` lives, which keeps `host`. Raises RuntimeError."""
        if host.numel() == 0:
            return
        address, num_bytes = host.data_ptr(), host.numel() * host.element_size()
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, num_bytes, _PORTABLE))
        # Unlocked before it is unmapped: a later mapping at the same address could not be locked.
        weakref.finalize(owner, torch.cuda.cudart().cudaHostUnregister, address).atexit = False

    # -- memory of other processes --------------------------------------------------------------------------------

    def export(self, array: Tensor) -> Any:
        """Return what another process on the node needs to `open` the memory of `array`; can be pickled.

        Raises RuntimeError or OSError where it cannot be shared.
        """
        return reductions.reduce_tensor(array)

    def open(self, exported: Any, device: torch.device) -> Tensor:
        """Return the array behind `exported`, for work on `device`. Raises RuntimeError or OSError where it cannot.

        The memory may be another GPU's, under a number of which this process knows nothing: it is mapped for this
        rank's own device, with peer access, and named as if it were there.
        """
        rebuild, arguments = exported
        arguments = list(arguments)
        arguments[_DEVICE] = device.index
        # The owner has synchronised before it sent this, and events of a GPU that is not visible here cannot be opened.
        arguments[_WAITS_FOR_EVENT] = False
        return rebuild(*arguments)
