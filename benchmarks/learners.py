"""Steps of many learners in one rank, against a loop over as many models, each with an optimizer of its own.

    python -m benchmarks.learners [--learners 32 128] [--models mlp cnn] [--batch-size 8] [--json FILE]

Both take turns on the same samples. A step is zero_grad, forward, loss, backward and the step of SGD with momentum; no
means. The memory is what the process holds after the steps, in units of the learners' parameters, gradients, momenta
and buffers.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import common
from benchmarks.figures import interval
from benchmarks.options import chosen, run
from hpcavg import models, stack
from hpcavg.errors import require_integer

SHAPE, CLASSES = (1, 8, 8), 10  # of the digits


def _without_batch_norm() -> nn.Module:
    model = models.build("cnn", SHAPE, CLASSES)
    return nn.Sequential(*(layer for layer in model.children() if not isinstance(layer, nn.BatchNorm2d)))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp of 32": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
    "mlp": lambda: models.build("mlp", SHAPE, CLASSES),
    "cnn without BatchNorm": _without_batch_norm,
    "cnn": lambda: models.build("cnn", SHAPE, CLASSES),
}


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def samples(learners: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Return a mini-batch of noise for each learner."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(learners, batch_size, *SHAPE, generator=generator)
    return inputs, torch.randint(CLASSES, (learners, batch_size), generator=generator)


def calls_of(make: Callable[[], nn.Module], learners: int, batch_size: int) -> dict[str, Callable[[], None]]:
    """Return a step of all learners: in a loop over models, and stacked."""
    inputs, targets = samples(learners, batch_size)
    singles = [make() for _ in range(learners)]
    optimizers = list(map(optimizer_of, singles))

    def loop() -> None:
        for row, (single, own) in enumerate(zip(singles, optimizers, strict=True)):
            own.zero_grad()
            cross_entropy(single(inputs[row]), targets[row]).backward()
            own.step()

    return {"loop": loop, "stacked": stacked_step(make, inputs, targets)}


def stacked_step(make: Callable[[], nn.Module], inputs: Tensor, targets: Tensor) -> Callable[[], None]:
    """Return a step of stacked learners."""
    stacked = stack(make(), len(inputs))
    optimizer = optimizer_of(stacked)

    def step() -> None:
        optimizer.zero_grad()
        stacked.gradients(cross_entropy, inputs, targets)
        optimizer.step()

    return step


def held_bytes() -> int:
    """Return the memory of this process, without what malloc keeps for later."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def memory_of(make: Callable[[], nn.Module], learners: int, batch_size: int) -> float:
    """Return what stacked learners add to the memory of this process, in units of their states."""
    before = held_bytes()
    step = stacked_step(make, *samples(learners, batch_size))
    for _ in range(3):
        step()
    model = make()
    state = 3 * sum(parameter.nbytes for parameter in model.parameters())
    state += sum(buffer.nbytes for buffer in model.buffers())
    return (held_bytes() - before) / (learners * state)


def main() -> None:
    """Measure every model with every number of learners, and print the table."""
    parser = common.Parser(__doc__)
    parser.add_argument("--learners", type=int, nargs="+", default=[32, 128], metavar="N")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help=f"{', '.join(MODELS)} [all]")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--seconds", type=float, default=10, help="of each pair, at most [10]")
    options = parser.parse_args()
    for name in ("batch_size", "repeats"):
        require_integer(name, getattr(options, name), 1)
    for number in options.learners:
        require_integer("learners", number, 1)
    topology = common.start(options)
    rows, results = [], []
    for name, learners in itertools.product(chosen("models", options.models, MODELS), options.learners):
        memory = memory_of(MODELS[name], learners, options.batch_size)
        calls = calls_of(MODELS[name], learners, options.batch_size)
        seconds = common.in_turns(topology.learner_ranks, calls, options.repeats, options.seconds)
        ratios = [loop / ours for loop, ours in zip(seconds["loop"], seconds["stacked"], strict=True)]
        loop_us, stacked_us = (1e6 * statistics.median(values) / learners for values in seconds.values())
        ratio, low, high = interval(ratios)
        figures = (f"{loop_us:.1f}", f"{stacked_us:.1f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}", f"{memory:.2f}")
        rows.append((name, str(learners), *figures))
        results.append({"model": name, "learners": learners, "seconds": seconds, "memory": memory})
    title = f"steps of many learners in one rank, batch size {options.batch_size}"
    heads = ("model", "learners", "loop, us a learner", "stacked", "loop / stacked", "95 % interval", "memory / states")
    common.show(topology, title, heads, rows)
    common.report(topology, options, results)


if __name__ == "__main__":
    run(main)
