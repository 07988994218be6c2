"""Images per second from CIFAR-10's arrays to a network's input, on one core per rank; copies of the data in memory.

    mpirun -np 1 python -m benchmarks.data_pipeline [--batch-sizes 32 64 128] [--json FILE]
    mpirun -np 4 python -m benchmarks.data_pipeline

feed: a learner's batches, with samples gathered, cropped, flipped and normalised. floor: samples only gathered and
normalised, by NumPy and torch; the rest is the price of augmentation and bookkeeping. one by one: the usual loop over
the images of a batch. All take turns. The time is that of the rank's processor alone, so other processes do not matter.
The last figure is the proportional set size of the training images over all ranks of a node, in copies of them: 1 means
that they are held once.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from mpi4py import MPI
from numpy.typing import NDArray

from benchmarks import common
from benchmarks.options import run
from hpcavg import Topology
from hpcavg.config.options import Config
from hpcavg.errors import require_integer
from hpcavg.tasks import Data, cifar10
from hpcavg.training.loader import BatchLoader
from hpcavg.utils.text import counted

IMAGES_A_TURN = 4096


def make_feed(topology: Topology, num_images: int, batch_size: int) -> tuple[BatchLoader, NDArray[np.uint8]]:
    """Return a feed, and its training images, of images of noise as the task cifar10 has it. Collective."""
    config = Config(task="cifar10", model="mlp", batch_size=batch_size)

    def load_data() -> Data:
        generator = np.random.default_rng(0)
        images = generator.integers(0, 256, (num_images, 3, 32, 32), dtype=np.uint8)
        labels = generator.integers(0, 10, num_images)
        return Data(images, labels, images[:100], labels[:100])

    task = dataclasses.replace(cifar10.task(config), load_data=load_data)
    feed = BatchLoader(task, config, topology, torch.device("cpu"))
    return feed, cast(NDArray[np.uint8], feed.data.train_inputs)


def one_by_one(images: NDArray[np.uint8], generator: torch.Generator) -> torch.Tensor:
    """Return a batch, made by a loop over its images."""
    made = []
    for image in torch.from_numpy(images):
        top, left = torch.randint(0, 9, (2,), generator=generator).tolist()
        image = torch.nn.functional.pad(image, (4, 4, 4, 4))[:, top : top + 32, left : left + 32]
        if torch.rand((), generator=generator) < 0.5:
            image = image.flip(2)
        made.append(cifar10.transform(image, None))
    return torch.stack(made)


def measure(topology: Topology, num_images: int, batch_size: int, repeats: int) -> dict[str, list[float]]:
    """Return the images per second of each way, on the slowest rank, a value for each turn."""
    feed, images = make_feed(topology, num_images, batch_size)
    generator = torch.Generator()
    order = np.random.default_rng(topology.rank).permutation(num_images)
    num_batches = IMAGES_A_TURN // batch_size
    indices = [np.resize(order, IMAGES_A_TURN)[i * batch_size : (i + 1) * batch_size] for i in range(num_batches)]

    def over(make: Callable[[NDArray[np.int64]], object]) -> Callable[[], None]:
        def call() -> None:
            for index in indices:
                make(index)

        return call

    ways = {
        "feed": over(lambda index: feed.next()),
        "floor": over(lambda index: cifar10.transform(torch.from_numpy(images[index]), None)),
        "one by one": over(lambda index: one_by_one(images[index], generator)),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(-1, repeats):
        for name, way in ways.items():
            started = time.process_time()
            way()
            taken = topology.all_ranks.allreduce(time.process_time() - started, MPI.MAX)
            if turn >= 0:  # the first warms up
                rates[name].append(num_batches * batch_size / taken)
    return rates


def copies_held(topology: Topology, images: NDArray[np.uint8]) -> float:
    """Return the proportional set size of `images`, summed over the ranks of a node, in copies of them. Collective."""
    images.max()  # touches every page
    topology.node.Barrier()
    total = topology.node.allreduce(proportional_set_size(images.ctypes.data), MPI.SUM)
    return total / images.nbytes


def proportional_set_size(address: int) -> int:
    """Return the bytes of this process's mapping at `address`; a page of n processes counts 1/n."""
    is_it = False
    with open("/proc/self/smaps") as file:
        for line in file:
            first, _, last = line.split()[0].partition("-")
            if last:  # a mapping begins
                is_it = int(first, 16) <= address < int(last, 16)
            elif is_it and first == "Pss:":
                return int(line.split()[1]) * 1024
    raise ValueError("no mapping holds this address")


def main() -> None:
    """Measure every batch size and print the tables on rank 0."""
    parser = common.Parser(__doc__)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--images", type=int, default=50_000, help="training images [50000]")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    for size in options.batch_sizes:
        require_integer("batch_sizes", size, 1, IMAGES_A_TURN)
    require_integer("repeats", options.repeats, 2)
    topology = common.start(options)
    require_integer("images", options.images, max(options.batch_sizes) * topology.num_learners)
    results = {size: measure(topology, options.images, size, options.repeats) for size in options.batch_sizes}
    rows = []
    for size, of_ways in results.items():
        rates = {name: statistics.median(values) for name, values in of_ways.items()}
        ratios = (f"{rates['feed'] / rates[other]:.2f}" for other in ("floor", "one by one"))
        rows.append((str(size), *(f"{rate:,.0f}" for rate in rates.values()), *ratios))
    title = f"images per second and rank, {counted(topology.num_learners, 'rank')}, one core each"
    common.show(topology, title, ("batch", "feed", "floor", "one by one", "feed/floor", "feed/one by one"), rows)
    _, images = make_feed(topology, options.images, 1)
    copies = copies_held(topology, images)
    ranks = counted(topology.node.Get_size(), "rank")
    held = f"{images.nbytes / 1e6:.0f} MB of training images, held {copies:.3f} times by {ranks} of the node"
    common.say(topology, held)
    common.report(topology, options, {"images_per_s": results, "copies_held": copies})


if __name__ == "__main__":
    run(main)
