"""Training batches of ImageNet per second on one core: from prepared shards, and from JPEG files as usual.

    python -m benchmarks.imagenet_pipeline [--images 256] [--batch-size 32] [--crop-size 224] [--data-dir DIR]

Without --data-dir, synthetic images are written and prepared in a temporary folder. All ways process the same images,
in turns, so a slow spell of the machine affects all. The peer decodes each file with Pillow, crops, resizes, changes
colours, flips and normalises, one image after the other. Files are in the page cache, except for "cold", which drops
the pages of the shards first. "test" resizes and crops the centre, without random changes.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageEnhance

from benchmarks import common
from benchmarks.figures import interval
from benchmarks.options import run
from hpcavg import Topology
from hpcavg.data import class_folders, gratings, imagenet, photo_augmentation, shards
from hpcavg.data.partition import batches
from hpcavg.errors import InputError, require_integer
from hpcavg.tasks.imagenet import Photos

PEER = "Pillow, JPEG files"


def decoded(paths: list[Path], crop: int, generator: torch.Generator) -> torch.Tensor:
    """Return a batch of these JPEG files, made one image after the other, as a usual loader does."""
    images = []
    for path in paths:
        with Image.open(path) as file:
            image = file.convert("RGB")
        top, left, height, width = photo_augmentation.random_boxes([(image.height, image.width)], generator)[0]
        box = (left, top, left + width, top + height)
        image = image.crop(box).resize((crop, crop), Image.Resampling.BILINEAR)
        factors = 1 + photo_augmentation.JITTER * (2 * torch.rand(3, generator=generator) - 1)
        for enhance, factor in zip(
            (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors.tolist(), strict=True
        ):
            image = enhance(image).enhance(factor)
        if torch.rand((), generator=generator) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255))
    return photo_augmentation.normalise(torch.stack(images))


def drop_pages(folder: Path) -> None:
    """Drop the shards in `folder` from the page cache."""
    for path in folder.glob("*.bin"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def contenders(source: Path, batch_size: int, crop: int, most: int) -> tuple[int, dict[str, Callable[[], object]]]:
    """Return the number of images of a turn, and the calls to time. All process the same images in the same order."""
    folder = shards.find(str(source))
    files = class_folders.find(source)[1]["train"]
    num_images = min(most, len(files), len(Photos(folder, "train")))
    index = [*batches(np.random.default_rng(0).permutation(num_images), batch_size)]
    held = [[photo.copy() for photo in Photos(folder, "train")[batch]] for batch in index]
    boxes = [photo_augmentation.random_boxes([photo.shape[:2] for photo in batch], seeded()) for batch in held]

    # Each turn maps the shards again: the system would not drop mapped pages.
    def train() -> None:
        photos = Photos(folder, "train")
        for batch in index:
            photo_augmentation.augmented(photos[batch], crop, seeded())

    def train_cold() -> None:
        drop_pages(folder)
        train()

    def test() -> None:
        photos = Photos(folder, "train")
        for batch in index:
            photo_augmentation.centred(photos[batch], crop)

    def resize() -> None:
        for both in zip(held, boxes, strict=True):
            photo_augmentation.cropped(*both, crop)

    def read() -> None:
        photos = Photos(folder, "train")
        for batch in index:
            for photo in photos[batch]:
                photo.max()

    def usual() -> None:
        for batch in index:
            decoded([source / files[i].path for i in batch], crop, seeded())

    return num_images, {
        PEER: usual,
        "hpcavg": train,
        "  read every byte": read,
        "  crop and resize": resize,
        "hpcavg, cold": train_cold,
        "hpcavg, test": test,
    }


def seeded() -> torch.Generator:
    """Return a generator with a fixed seed."""
    return torch.Generator().manual_seed(0)


def prepare(folder: Path, num_images: int, size: int, topology: Topology) -> None:
    """Write at least `num_images` synthetic images and prepare them; print the time of each."""
    for what, call in {
        "written": lambda: gratings.synthesize(folder, num_images / gratings.NUM_TRAIN, 0),
        "prepared": lambda: imagenet.prepare(folder, folder / "prepared", size, topology.learner_ranks),
    }.items():
        started = time.perf_counter()
        call()
        print(f"{what} in {time.perf_counter() - started:.1f} s")


def main() -> None:
    """Measure and print the table."""
    parser = common.Parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="images in a turn")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--crop-size", type=int, default=224)
    parser.add_argument("--size", type=int, default=256, help="shorter side of prepared synthetic images")
    parser.add_argument("--data-dir", type=Path, help="prepared class folders of JPEG files [synthetic images]")
    parser.add_argument("--repeats", type=int, default=11, help="turns")
    options = parser.parse_args()
    for name in ("images", "batch_size", "crop_size", "repeats"):
        require_integer(name, getattr(options, name), 1)
    topology = common.start(options)
    if topology.num_learners > 1:
        raise InputError("data_dir", options.data_dir, "measured on one rank, without mpirun")
    with tempfile.TemporaryDirectory() as temporary:
        source = options.data_dir or Path(temporary)
        if options.data_dir is None:
            prepare(source, options.images, options.size, topology)
        num_images, calls = contenders(source, options.batch_size, options.crop_size, options.images)
        seconds = common.in_turns(topology.learner_ranks, calls, options.repeats)
    rows = []
    for name, values in seconds.items():
        in_ms = [value / num_images * 1e3 for value in values]
        ratios = [peer / own for peer, own in zip(seconds[PEER], values, strict=True)]
        median, low, high = interval(ratios)
        rate = statistics.median(num_images / value for value in values)
        rows.append(
            (name, f"{statistics.median(in_ms):.3f}", f"{rate:.0f}", f"{median:.1f}", f"{low:.1f} to {high:.1f}")
        )
    title = f"ImageNet batches of {options.batch_size} at {options.crop_size}, one core, {num_images} images a turn"
    common.show(topology, title, ("", "ms an image", "images/s", "times the peer", "95 % interval"), rows)
    common.report(topology, options, seconds)


if __name__ == "__main__":
    run(main)
