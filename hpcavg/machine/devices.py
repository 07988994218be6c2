"""The device that a rank computes on."""

from __future__ import annotations

import torch

from hpcavg.errors import InputError


def choose_device(name: str, node_rank: int) -> torch.device:
    """Return the device of a rank. Ranks of a node take turns on its GPUs.

    Parameters
    ----------
    name : {"auto", "cpu", "cuda"}
        ``auto`` is a GPU if there is one.
    node_rank : int
        The rank's number on its node.

    Raises
    ------
    InputError
        `name` is ``cuda``, and torch sees no GPU.
    """
    num_gpus = torch.cuda.device_count() if name != "cpu" else 0
    if name == "cuda" and num_gpus == 0:
        raise InputError("device", name, "auto or cpu: no CUDA device is visible")
    if num_gpus == 0:
        return torch.device("cpu")
    device = torch.device("cuda", node_rank % num_gpus)
    torch.cuda.set_device(device)
    return device
