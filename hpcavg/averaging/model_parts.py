"""The tensors of a model and an optimizer by name, and their forms, which must be the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hpcavg.averaging.flat_buffer import refuse_lazy
from hpcavg.errors import InputError

# The dtypes of averaged buffers, and of trained parameters.
_REAL = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TRAINED = (*_REAL, torch.complex64, torch.complex128)


@dataclass
class Parts:
    """The tensors of a model, and of its optimizer if that has more, by name. A tied tensor has several names.

    Attributes
    ----------
    parameters : all parameters, the model's first.
    buffers : all buffers.
    non_persistent : the names of the buffers that are no part of the model's state (``persistent=False``).
    """

    parameters: dict[str, Tensor]
    buffers: dict[str, Tensor]
    non_persistent: set[str]

    @property
    def trained(self) -> dict[str, Tensor]:
        """The parameters that require a gradient."""
        return {name: tensor for name, tensor in self.parameters.items() if tensor.requires_grad}

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The parameters that do not require a gradient."""
        return {name: tensor for name, tensor in self.parameters.items() if not tensor.requires_grad}


_SHARDED = "a model that is whole on every rank: leave the sharding out"
# Classes that average gradients themselves or shard the model. By name, so torch's modules need not be imported.
_WRAPPERS = {
    "DistributedDataParallel": (
        "the plain module, whose gradients nobody else averages: leave the wrapper out, or pass model.module and call"
        " that in the loop, never the wrapper"
    ),
    "DDP": "a module whose gradients nobody else averages: leave replicate out",
    "ReplicateModule": "a module whose gradients nobody else averages: leave replicate out",
    "FullyShardedDataParallel": _SHARDED,
    "FSDPModule": _SHARDED,
}


def refuse_wrapped(model: torch.nn.Module) -> None:
    """Raise `InputError` if torch synchronises or shards the model, or one of its modules."""
    for kind, name in {type(module): name for name, module in model.named_modules()}.items():
        for base in kind.__mro__:
            if base.__name__ in _WRAPPERS and base.__module__.startswith("torch."):
                given = f"{name} ({base.__name__})" if name else base.__name__
                raise InputError("model", given, _WRAPPERS[base.__name__])


def look_up(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Parts:
    """Return the current tensors of `model` and `optimizer`."""
    parameters: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    known = set(map(id, parameters.values()))
    parameters |= {name: tensor for name, tensor in optimized(optimizer) if id(tensor) not in known}
    non_persistent = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return Parts(parameters, dict(model.named_buffers(remove_duplicate=False)), non_persistent)


def optimized(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield name and tensor of the optimizer's parameters; the name is ``optimizer.GROUP.PLACE``."""
    for index, group in enumerate(optimizer.param_groups):
        for place, tensor in enumerate(group["params"]):
            yield f"optimizer.{index}.{place}", tensor


def check(parts: Parts) -> None:
    """Raise `InputError` for a tensor that cannot be kept the same on all ranks."""
    named = [*parts.parameters.items(), *parts.buffers.items()]
    refuse_lazy(named)
    for name, tensor in named:
        if type(tensor).__name__ == "DTensor":
            raise InputError("model", f"{name} (DTensor)", _SHARDED)
        if tensor.is_meta:
            raise InputError("model", f"{name} on the meta device", "a tensor that has values")
        if is_plain(tensor):
            if isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad and tensor.dtype not in _TRAINED:
                raise InputError("model", f"{name} of {tensor.dtype}", "of 16, 32 or 64 bits, or frozen")
        elif tensor.requires_grad:
            raise InputError("model", f"{name} of layout {tensor.layout}", "dense, or frozen")
        else:
            contents(name, tensor)


def describe(parts: Parts, optimizer: torch.optim.Optimizer) -> list[tuple[object, ...]]:
    """Return what must be the same on all ranks: a line per tensor, and per place in the optimizer."""
    first_in: dict[int, str] = {}
    lines: list[tuple[object, ...]] = []
    for kind, named in (("parameter", parts.parameters), ("buffer", parts.buffers)):
        for name, tensor in named.items():
            memory = (tensor.data_ptr() if is_plain(tensor) else 0) or id(tensor)
            tied_to = first_in.setdefault(memory, name)
            what = "frozen parameter" if kind == "parameter" and not tensor.requires_grad else kind
            line = (name, what, tuple(tensor.shape), str(tensor.dtype), str(tensor.layout))
            lines.append(line if tied_to is name else (*line, f"tied to {tied_to}"))
    names = {id(tensor): name for name, tensor in reversed(parts.parameters.items())}
    lines += [(place, names[id(tensor)]) for place, tensor in optimized(optimizer)]
    return lines


def is_plain(tensor: Tensor) -> bool:
    """Return whether the tensor is dense: its elements lie in memory one by one, at strides."""
    return tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_nested)


def is_averaged_buffer(tensor: Tensor) -> bool:
    """Return whether a mean of a buffer like `tensor` is defined."""
    return is_plain(tensor) and tensor.dtype in _REAL


_COMPRESSED: dict[torch.layout, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    torch.sparse_csr: lambda t: (t.crow_indices(), t.col_indices()),
    torch.sparse_bsr: lambda t: (t.crow_indices(), t.col_indices()),
    torch.sparse_csc: lambda t: (t.ccol_indices(), t.row_indices()),
    torch.sparse_bsc: lambda t: (t.ccol_indices(), t.row_indices()),
}


def contents(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return plain tensors that hold the contents of a sparse or quantized tensor; `InputError` for other layouts."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        return tensor.int_repr(), tensor.dequantize()  # the values depend on scales and zero points
    if tensor.layout is torch.sparse_coo:
        tensor = tensor.coalesce()
        return tensor.indices(), tensor.values()
    if tensor.layout in _COMPRESSED:
        return (*_COMPRESSED[tensor.layout](tensor), tensor.values())
    raise InputError("model", f"{name} of layout {tensor.layout}", "dense, sparse or quantized")
