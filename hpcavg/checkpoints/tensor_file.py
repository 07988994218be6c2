"""Tensor files: a tree of plain values and tensors as one file in the format of safetensors, without pickle.

The file has three parts, all little-endian: 8 bytes with the header's length, the header in JSON, the tensors' bytes.
The tree is JSON inside the header's ``__metadata__``. Values that JSON knows stand for themselves, except dictionaries.
Every other value is an object whose only key is its kind, such as ``{"tuple": [...]}`` or ``{"tensor": name}``.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from hpcavg.errors import InputError
from hpcavg.utils import format_version
from hpcavg.utils.files import open_file

# The names that safetensors uses. Tensors of other dtypes are stored as bytes, with their dtype in the tree.
_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.complex64: "C64",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_METADATA = "__metadata__"
# The first format is not written: equal models keep the checksums that they have always had.
_FORMAT = 1


def chunks(tree: Any) -> Iterator[bytes | memoryview]:
    """Yield the bytes of the file that holds `tree`: the header, then each tensor's own memory.

    A tensor is copied, when its turn comes, only if it is not contiguous or not in the host's memory.

    Parameters
    ----------
    tree : object
        Of None, bool, int, float, str, bytes, list, tuple, dict (with any of these as keys), dense tensors and arrays
        of numbers.

    Raises
    ------
    TypeError
        For anything else in the tree.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_encode(tree, "", tensors), separators=(",", ":"))
    header: dict[str, Any] = {_METADATA: {"format": "pt", "tree": text}}
    # The widest dtypes come first: so every tensor starts at a multiple of its element size, and can be mapped.
    in_order = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    start = 0
    for name, tensor in in_order:
        end = start + tensor.numel() * tensor.itemsize
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    yield struct.pack("<Q", len(encoded)) + encoded
    for _, tensor in in_order:
        yield _memory(tensor.detach().cpu().resolve_conj().resolve_neg().contiguous())


def digest(tree: Any) -> str:
    """Return the SHA-256 of the file that would hold `tree`, in hexadecimal.

    Two trees have the same one exactly if they are equal in kinds, order, dtypes, shapes and every bit.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.checkpoints import tensor_file
    >>> tensor_file.digest({"w": torch.arange(3.0)})[:16]
    '1d9bfdd1e54cd7db'
    """
    sha = hashlib.sha256()
    for chunk in chunks(tree):
        sha.update(chunk)
    return sha.hexdigest()


def read(path: Path | str, option: str, only: Collection[str] | None = None) -> Any:
    """Return the tree that a file holds, with its tensors in the host's memory.

    A changed bit inside a tensor is not found: that takes a checksum.

    Parameters
    ----------
    path : Path or str
        The file.
    option : str
        The option that an error names.
    only : collection of str
        Return only these keys of the tree; all by default.

    Raises
    ------
    InputError
        If the file is damaged, newer, or no such file.
    """
    try:
        with open_file(path) as file:
            return _read(file, only)
    except OSError as error:
        reason: str | None = error.strerror
    except (_Damage, format_version.NewerFormatError) as error:
        reason = str(error)
    except Exception as error:  # a damaged header raises many kinds, in JSON, in torch or below
        reason = f"its header cannot be read, {type(error).__name__}"
    raise InputError(option, path, f"a whole safetensors file written by hpcavg ({reason})")


class _Damage(Exception):
    """What is wrong with a file, in a few words."""


def _read(file: BinaryIO, only: Collection[str] | None) -> Any:
    num_bytes = os.fstat(file.fileno()).st_size
    if num_bytes < 8:
        raise _Damage(f"{num_bytes} bytes")
    (header_bytes,) = struct.unpack("<Q", file.read(8))
    start = 8 + header_bytes
    if start > num_bytes:
        raise _Damage(f"a header of {header_bytes} bytes in a file of {num_bytes}")
    header = json.loads(file.read(header_bytes))
    metadata = header.pop(_METADATA)
    format_version.check(int(metadata.get("version", format_version.FIRST)), _FORMAT)
    tree = json.loads(metadata["tree"])
    _check_layout(header, num_bytes - start)
    if only is not None:
        tree = {"dict": {key: tree["dict"][key] for key in only}}

    def load(name: str) -> Tensor:
        entry = header.pop(name)  # a second use is an error, so a crafted file takes no more memory than its length
        tensor = torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]])
        file.seek(start + entry["data_offsets"][0])
        if file.readinto(_memory(tensor)) != tensor.numel() * tensor.itemsize:  # type: ignore[attr-defined]
            raise _Damage("it became shorter while it was read")
        return tensor

    return _decode(tree, load)


def _check_layout(header: dict[str, Any], num_bytes: int) -> None:
    """Raise `_Damage` unless the tensors, each as long as its shape says, fill `num_bytes` without gaps."""
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, offsets = entry["shape"], entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*shape, *offsets)):
            raise _Damage(f"a shape or offset of {name!r} is no number")
        size = math.prod(shape) * _DTYPES[entry["dtype"]].itemsize
        if offsets != [end, end + size]:
            raise _Damage(f"{name!r} is not where it must be")
        end += size
    if end != num_bytes:
        raise _Damage(f"{num_bytes} bytes of tensors where the header tells of {end}")


def _memory(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor as bytes."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _encode(value: Any, place: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON holds it. Put its tensors into `tensors`, named by the keys that lead to them."""

    def inside(key: object, child: Any) -> Any:
        return _encode(child, f"{place}/{key}" if place else str(key), tensors)

    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):  # JSON readers refuse or round long integers
        return int(value) if -(2**63) <= value < 2**63 else {"int": hex(value)}
    if isinstance(value, float):  # JSON knows no NaN, and its bits count
        return float(value) if math.isfinite(value) else {"float": struct.pack("<d", value).hex()}
    if isinstance(value, bytes):
        return {"bytes": value.hex()}
    if isinstance(value, list):
        return [inside(index, child) for index, child in enumerate(value)]
    if isinstance(value, tuple):
        return {"tuple": [inside(index, child) for index, child in enumerate(value)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: inside(key, child) for key, child in value.items()}}
    if isinstance(value, dict):
        return {"items": [[inside("key", key), inside(key, child)] for key, child in value.items()]}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        return {"array": _encode(torch.from_numpy(np.array(value, order="C")), place, tensors)}
    if not isinstance(value, Tensor) or value.layout is not torch.strided or value.is_quantized or value.is_meta:
        raise TypeError(f"{place or 'the value'}: a state file holds no {type(value).__name__} of this kind")
    if value.dtype not in _NAMES:
        values = value.detach().cpu().resolve_conj().resolve_neg().contiguous().unsqueeze(-1).view(torch.uint8)
        return {"bits": [str(value.dtype).removeprefix("torch."), _encode(values, place, tensors)]}
    name = place or "value"
    while name in tensors or name == _METADATA:
        name += "'"
    tensors[name] = value
    return {"tensor": name}


def _decode(value: Any, load: Callable[[str], Tensor]) -> Any:
    """Return the inverse of `_encode`; ``load(name)`` returns a tensor."""
    if isinstance(value, list):
        return [_decode(child, load) for child in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return load(content)
    if kind == "dict":
        return {key: _decode(child, load) for key, child in content.items()}
    if kind == "items":
        return {_decode(key, load): _decode(child, load) for key, child in content}
    if kind == "tuple":
        return tuple(_decode(child, load) for child in content)
    if kind == "array":
        return _decode(content, load).numpy()
    if kind == "bits":
        dtype, values = content
        return _decode(values, load).view(getattr(torch, dtype)).squeeze(-1)
    if kind == "int":
        return int(content, 16)
    if kind == "float":
        return struct.unpack("<d", bytes.fromhex(content))[0]
    if kind == "bytes":
        return bytes.fromhex(content)
    raise _Damage(f"a {kind!r} in its tree, {format_version.NEWER}")
