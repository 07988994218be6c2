"""The local optimizer, its loss and its learning rate over the run."""

from __future__ import annotations

from dataclasses import dataclass

from hpcavg.config.section import Section, integer, number, option

_part = number(lambda part: 0 < part <= 1, "a number above 0 and at most 1")
_below_one = number(lambda value: 0 <= value < 1, "a number of at least 0 and below 1")


@dataclass(frozen=True)
class OptimizationOptions(Section):
    """The local optimizer, its loss and its learning rate over the run."""

    title = "optimizer"

    optimizer: str = option("sgd", "local optimizer", choices=("sgd", "adam", "adamw"))
    learning_rate: float = option(
        0.05, "learning rate at its highest", number(lambda rate: 0 < rate < 1e30, "a positive number below 1e30")
    )
    momentum: float = option(0.9, "momentum of sgd, in [0, 1); Nesterov's for eamsgd", _below_one)
    nesterov: bool = option(False, "Nesterov's momentum")
    # AdamW multiplies it by the rate: the product, too, must be one that float32 can hold.
    weight_decay: float = option(
        1e-4,
        "weight decay; the L2 term of logistic regression",
        number(lambda decay: 0 <= decay < 1e8, "a number of at least 0 and below 1e8"),
    )
    clip_norm: float | None = option(
        None,
        "gradient norm above which gradients are scaled down to it",
        number(lambda norm: norm > 0, "a positive number"),
    )
    label_smoothing: float = option(0.0, "part of a target spread over all classes while training", _below_one)
    schedule: str = option(
        "constant", "learning rate over the run", choices=("constant", "step", "cosine", "one-cycle")
    )
    decay_steps: int | None = option(None, "steps between decays (step); unset: a third of the run", integer(1))
    decay_epochs: tuple[int, ...] | None = option(
        None, "epochs after which to decay (step), as 150,275; instead of --decay-steps"
    )
    decay_factor: float = option(0.1, "factor of each decay (step)", _part)
    cycle_peak: float = option(
        0.3,
        "part of the run after which the rate is at its highest (one-cycle)",
        number(lambda part: 0 < part < 1, "a number above 0 and below 1"),
    )
    cycle_start: float = option(0.04, "rate at the start, as a part of the highest (one-cycle)", _part)
    cycle_end: float = option(4e-6, "rate at the end, as a part of the highest (one-cycle)", _part)
    cycle_shape: str = option("cosine", "how the rate rises and falls (one-cycle)", choices=("cosine", "linear"))
    warmup_steps: int = option(0, "steps of linear warm-up from a hundredth of the rate", integer(0))

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("nesterov", not self.nesterov or self.momentum > 0, "false where momentum is 0")
        epochs = self.decay_epochs
        rises = epochs is None or (epochs != () and (0, *epochs) == tuple(sorted({0, *epochs})))
        self.require("decay_epochs", rises, "rising epochs of at least 1, as 150,275")
        both = self.decay_steps is not None and epochs is not None
        self.require("decay_epochs", not both, "unset where --decay-steps is given")
        for name in ("decay_steps", "decay_epochs"):  # else the rate would stay, unnoticed
            decays = self.schedule == "step" or getattr(self, name) is None
            self.require(name, decays, f"unset with --schedule {self.schedule}, or with --schedule step")
