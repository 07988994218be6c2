"""Builds torch's optimizer of every learner, and the scheduler of its learning rate."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import lr_scheduler

from hpcavg.config.sections.optimization import OptimizationOptions


def build_optimizer(options: OptimizationOptions, parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """Return the optimizer over `parameters` that the options describe."""
    rate, decay = options.learning_rate, options.weight_decay
    if options.optimizer == "sgd":
        return torch.optim.SGD(parameters, rate, options.momentum, weight_decay=decay, nesterov=options.nesterov)
    kind = torch.optim.Adam if options.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, rate, weight_decay=decay)


def build_scheduler(
    options: OptimizationOptions, optimizer: torch.optim.Optimizer, total_steps: int, steps_per_epoch: int
) -> lr_scheduler.LRScheduler | None:
    """Return the scheduler, to be stepped after every training step; None if the rate is constant.

    With warm-up, the rate rises linearly over the first ``options.warmup_steps``, and the schedule fills the remaining
    steps. The epochs of ``options.decay_epochs`` are those of the run.

    Parameters
    ----------
    options : OptimizationOptions
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
    warmup = min(options.warmup_steps, total_steps - 1)
    steps = total_steps - warmup
    main: lr_scheduler.LRScheduler | None = None
    if options.schedule == "step" and options.decay_epochs is not None:
        milestones = [epoch * steps_per_epoch - warmup for epoch in options.decay_epochs]
        main = lr_scheduler.MultiStepLR(optimizer, milestones, gamma=options.decay_factor)
    elif options.schedule == "step":
        main = lr_scheduler.StepLR(optimizer, options.decay_steps or -(-steps // 3), gamma=options.decay_factor)
    elif options.schedule == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    elif options.schedule == "one-cycle":
        # One step more than is taken: torch refuses to be stepped after its last value.
        main = lr_scheduler.OneCycleLR(
            optimizer,
            options.learning_rate,
            total_steps=steps + 1,
            pct_start=options.cycle_peak,
            div_factor=1 / options.cycle_start,
            final_div_factor=options.cycle_start / options.cycle_end,
            anneal_strategy="cos" if options.cycle_shape == "cosine" else "linear",
            cycle_momentum=False,
        )
    if not warmup:
        return main
    rise = lr_scheduler.LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    if main is None:
        return rise
    return lr_scheduler.SequentialLR(optimizer, [rise, main], milestones=[warmup])
