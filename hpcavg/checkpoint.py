"""Model files: a state_dict as an HDF5 file, no pickle."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import torch
from torch import Tensor


def save_model(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write a state_dict, one dataset per tensor; dtypes that NumPy does not know (bfloat16) as their bytes."""
    with h5py.File(path, "x") as file:
        for name, tensor in state.items():
            tensor = tensor.detach().cpu().contiguous()
            try:
                values = tensor.numpy()
            except TypeError:
                values = tensor.reshape(-1).view(torch.uint8).numpy()
            dataset = file.create_dataset(name, data=values)
            dataset.attrs["dtype"] = str(tensor.dtype).removeprefix("torch.")
            dataset.attrs["shape"] = tensor.shape


def load_model(path: Path | str) -> dict[str, Tensor]:
    """Return the state_dict that `save_model` wrote, for ``model.load_state_dict``."""
    state = {}
    with h5py.File(path, "r") as file:

        def visit(name: str, item: h5py.Dataset | h5py.Group) -> None:
            if isinstance(item, h5py.Dataset):
                dtype = getattr(torch, item.attrs["dtype"])
                values = torch.from_numpy(np.asarray(item[...]))
                values = values if values.dtype == dtype else values.view(dtype)
                state[name] = values.reshape(tuple(map(int, item.attrs["shape"])))

        file.visititems(visit)
    return state


def digest(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of all values of a state_dict: equal exactly when two models are equal bit for bit."""
    sha = hashlib.sha256()
    for name, tensor in state.items():
        sha.update(name.encode())
        sha.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
