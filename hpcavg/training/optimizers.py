"""Builds torch's optimizer of every learner, and the scheduler of its learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from hpcavg.config.options import Config


def build_optimizer(config: Config, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer over `parameters` that the configuration describes."""
    rate, decay = config.learning_rate, config.weight_decay
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, config.momentum, weight_decay=decay, nesterov=config.nesterov)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, weight_decay=decay)


def build_scheduler(
    config: Config, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """Return the scheduler, to be stepped after every training step; None if the rate is constant.

    With warm-up, the rate rises linearly over the first ``config.warmup_steps``, and the schedule fills the remaining
    steps. The epochs of ``config.decay_epochs`` are those of the run.

    Parameters
    ----------
    config : Config
        Its ``schedule`` and the options of that.
    optimizer : Optimizer
        The learner's.
    total_steps : int
        Steps of the run.
    steps_per_epoch : int
        Steps of an epoch.
    """
    # Torch warns if the scheduler steps before the optimizer. That happens after a resume with another number of
    # learners, whose optimizers are new, and if the first gradients overflow in half precision.
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
    warmup = min(config.warmup_steps, total_steps - 1)
    steps = total_steps - warmup
    main: lr_scheduler.LRScheduler | None = None
    if config.schedule == "step" and config.decay_epochs is not None:
        milestones = [epoch * steps_per_epoch - warmup for epoch in config.decay_epochs]
        main = lr_scheduler.MultiStepLR(optimizer, milestones, gamma=config.decay_factor)
    elif config.schedule == "step":
        main = lr_scheduler.StepLR(optimizer, config.decay_steps or -(-steps // 3), gamma=config.decay_factor)
    elif config.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    elif config.schedule == "one-cycle":
        # One step more than is taken: torch refuses to be stepped after its last value.
        main = lr_scheduler.OneCycleLR(
            optimizer,
            config.learning_rate,
            total_steps=steps + 1,
            pct_start=config.cycle_peak,
            div_factor=1 / config.cycle_start,
            final_div_factor=config.cycle_start / config.cycle_end,
            anneal_strategy="cos" if config.cycle_shape == "cosine" else "linear",
            cycle_momentum=False,
        )
    if not warmup:
        return main
    rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    if main is None:
        return rise
    return lr_scheduler.SequentialLR(optimizer, [rise, main], milestones=[warmup])
