"""The optimizer that every learner steps with, from torch's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hpcavg.config import Config


def build(config: Config, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer over `parameters` that the configuration describes."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, config.momentum, weight_decay=decay, nesterov=config.nesterov)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, weight_decay=decay)
