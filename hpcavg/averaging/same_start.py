"""The same model on every rank at the start: forms are compared, values are broadcast."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hpcavg.averaging import model_parts
from hpcavg.averaging.flat_buffer import span
from hpcavg.averaging.health import digest
from hpcavg.distributed.topology import Topology
from hpcavg.errors import InputError

# Small tensors travel together, in messages of up to this size.
_MESSAGE_BYTES = 2**24
# Large tensors travel in parts of this size: MPI counts bytes in 32 bits.
_CHUNK_BYTES = 2**30


def check_same_form(lines: list[tuple[object, ...]], topology: Topology) -> None:
    """Raise `InputError` on every rank if the models differ in form. Collective over all ranks.

    Parameters
    ----------
    lines : what `model_parts.describe` returned on this rank.
    topology : all ranks.
    """
    all_ranks, rank = topology.all_ranks, topology.rank
    digests = all_ranks.allgather(hashlib.sha256(repr(lines).encode()).digest())
    if len(set(digests)) == 1:
        return
    first = all_ranks.bcast(lines, root=0)
    error = None
    if lines != first:
        here, there = next(
            (pair for pair in zip(lines, first, strict=False) if pair[0] != pair[1]),
            (f"{len(lines)} tensors", f"{len(first)} tensors"),
        )
        error = InputError("model", f"{here} on rank {rank}", f"{there}, as on rank 0")
    topology.raise_everywhere(error)


def check_same_contents(named: Mapping[str, Tensor], topology: Topology) -> None:
    """Raise `InputError` on every rank if sparse or quantized tensors differ. Collective over all ranks.

    These tensors cannot be broadcast.

    Parameters
    ----------
    named : all tensors by name; those that can be broadcast are not compared.
    topology : all ranks.
    """
    own = {name: digest(model_parts.contents(name, t)) for name, t in named.items() if not model_parts.is_plain(t)}
    of_ranks = topology.all_ranks.allgather(own)
    for rank, digests in enumerate(of_ranks):
        for name, value in digests.items():
            if value != of_ranks[0][name]:
                kind = "quantized" if named[name].is_quantized else f"{named[name].layout}"
                raise InputError("model", f"{name} ({kind}) on rank {rank}", "the same as on rank 0 from the start")


def broadcast(tensors: list[Tensor], topology: Topology) -> None:
    """Give every rank rank 0's values. Collective over all ranks.

    Parameters
    ----------
    tensors : dense, the same shapes and dtypes on every rank. Several tensors travel in one message.
    topology : all ranks.
    """
    parts = [_as_bytes(tensor) for tensor in tensors]
    is_packed = len(parts) > 1
    packed = torch.cat(parts) if is_packed else parts[0]
    for chunk in packed.split(_CHUNK_BYTES):
        topology.all_ranks.Bcast(chunk.numpy(), root=0)
    if topology.rank:
        for tensor, values in zip(tensors, packed.split([len(part) for part in parts]), strict=True):
            aligned = values.clone() if is_packed else values
            put(aligned.view(tensor.dtype).view(tensor.shape), tensor)


def in_messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in lists, each of which fits into one message or holds one tensor."""
    message: list[Tensor] = []
    num_bytes = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if message and num_bytes + size > _MESSAGE_BYTES:
            yield message
            message, num_bytes = [], 0
        message.append(tensor)
        num_bytes += size
    if message:
        yield message


def put(values: Tensor, tensor: Tensor) -> None:
    """Copy `values` to `tensor`, which gets new memory if its elements share memory with each other."""
    if values.data_ptr() == tensor.data_ptr() and tensor.numel():
        return
    with torch.no_grad():
        if tensor.numel() and span(tensor) < tensor.numel():
            if not torch.equal(values, tensor):
                tensor.data = values.clone()
        else:
            tensor.copy_(values)


def _as_bytes(tensor: Tensor) -> Tensor:
    """Return the values in the order of their indices, on the host; the tensor's own memory if it has this order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
