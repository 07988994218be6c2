"""Augmentation of photographs: random crops, colours and flips (Hier-AVG, section 4.4).

Photographs are lists of uint8 arrays of shape (height, width, 3). Results are float32 tensors of shape
(n, 3, crop, crop). All random numbers come from the given generator, for all images at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor
from torch.nn.functional import interpolate

MEAN = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
AREA, ASPECT, JITTER = (0.08, 1.5), (3 / 4, 4 / 3), 0.4
RESIZED = 256 / 224
"""The shorter side of a test image before its central crop, as a multiple of the crop's side."""
_ATTEMPTS = 10
_AT_A_TIME = 8
"""How many images are processed together: few enough for the processor's cache, which is twice as fast."""
_GREY = (0.299, 0.587, 0.114)

Photos = Sequence[NDArray[np.uint8]]
Box = tuple[int, int, int, int]


def augmented(photos: Photos, crop: int, generator: Generator) -> Tensor:
    """Return random crops resized to `crop`, with jittered colours, half of them flipped, normalised."""
    boxes = random_boxes([photo.shape[:2] for photo in photos], generator)
    factors = 1 + JITTER * (2 * torch.rand(3, len(photos), generator=generator) - 1)
    is_flipped = torch.rand(len(photos), generator=generator) < 0.5
    batch = torch.empty(len(photos), 3, crop, crop)
    for start in range(0, len(photos), _AT_A_TIME):
        part = slice(start, start + _AT_A_TIME)
        crops = cropped(photos[part], boxes[part], crop)
        # A flip of the bytes before the change of colours gives the same as one of the floats after it, for less.
        for i in is_flipped[part].nonzero().flatten().tolist():
            crops[i] = crops[i].flip(2)
        normalise(jitter(crops, factors[:, part], batch[part]))
    return batch


def centred(photos: Photos, crop: int) -> Tensor:
    """Return normalised central crops of images whose shorter side is resized to 256/224 of `crop`."""
    shorter = round(crop * RESIZED)
    batch = torch.empty(len(photos), 3, crop, crop, dtype=torch.uint8)
    for i, photo in enumerate(photos):
        height, width = (shorter * side // min(photo.shape[:2]) for side in photo.shape[:2])
        top, left = round((height - crop) / 2), round((width - crop) / 2)
        batch[i] = _resized(photo, height, width)[:, top : top + crop, left : left + crop]
    return normalise(batch.float().div_(255))


def cropped(photos: Photos, boxes: Sequence[Box], crop: int) -> Tensor:
    """Return a box of each photograph, resized to `crop` x `crop`: uint8, shape (n, 3, crop, crop)."""
    batch = torch.empty(len(photos), 3, crop, crop, dtype=torch.uint8, memory_format=torch.channels_last)
    for i, (photo, (top, left, height, width)) in enumerate(zip(photos, boxes, strict=True)):
        batch[i] = _resized(photo[top : top + height, left : left + width], crop, crop)
    return batch.contiguous()


def random_boxes(sizes: Sequence[tuple[int, ...]], generator: Generator) -> list[Box]:
    """Return a random box for each image: top, left, height and width in pixels.

    The box's area, as a share of the image's, is uniform in `AREA`; the logarithm of width over height is uniform
    between those of `ASPECT`; the position is uniform. A box that does not fit in the image is drawn again, at most ten
    times; then the box is `central_box`.

    Parameters
    ----------
    sizes : sequence of tuples of int
        Height and width of each image.
    generator : torch.Generator
        On the CPU.
    """
    shape = torch.tensor([size[:2] for size in sizes], dtype=torch.float64)
    draws = torch.rand(4, len(sizes), _ATTEMPTS, generator=generator, dtype=torch.float64)
    area = (AREA[0] + draws[0] * (AREA[1] - AREA[0])) * shape.prod(1)[:, None]
    low, high = (math.log(aspect) for aspect in ASPECT)
    aspect = torch.exp(low + draws[1] * (high - low))
    heights, widths = (area / aspect).sqrt().round(), (area * aspect).sqrt().round()
    fits = (heights <= shape[:, :1]) & (widths <= shape[:, 1:]) & (heights > 0) & (widths > 0)
    tops = (draws[2] * (shape[:, :1] - heights + 1)).floor()
    lefts = (draws[3] * (shape[:, 1:] - widths + 1)).floor()
    drawn = torch.stack([tops, lefts, heights, widths], dim=2)
    first = fits.int().argmax(dim=1)
    found = drawn[torch.arange(len(sizes)), first].long().tolist()
    some_fit = fits.any(dim=1).tolist()
    return [
        tuple(box) if fit else central_box(*size[:2]) for box, fit, size in zip(found, some_fit, sizes, strict=True)
    ]


def central_box(height: int, width: int) -> Box:
    """Return top, left, height and width of the largest central box whose aspect is within `ASPECT`."""
    box_height = min(height, round(width / ASPECT[0]))
    box_width = min(width, round(height * ASPECT[1]))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def jitter(crops: Tensor, factors: Tensor, out: Tensor) -> Tensor:
    """Change the colours of images.

    Three changes in this order, each clipped to 0..1: colours times brightness; distance from the image's mean grey
    times contrast; distance from the pixel's own grey times saturation.

    Parameters
    ----------
    crops : Tensor
        uint8, shape (n, 3, h, w).
    factors : Tensor
        Shape (3, n): brightness, contrast and saturation; 1 changes nothing.
    out : Tensor
        float32, shape (n, 3, h, w). The result, in 0..1, is written to it.

    Returns
    -------
    Tensor
        `out`.
    """
    brightness, contrast, saturation = factors[:, :, None, None, None]
    out.copy_(crops).mul_(brightness / 255).clamp_(max=1)  # torch multiplies bytes and floats four times as slowly
    mean = _grey(out).mean((2, 3), keepdim=True)
    out.mul_(contrast).add_(mean.mul_(1 - contrast)).clamp_(0, 1)
    grey = _grey(out).mul_(1 - saturation)
    return torch.addcmul(grey, out, saturation, out=out).clamp_(0, 1)


def normalise(colours: Tensor) -> Tensor:
    """Subtract ImageNet's mean from `colours`, in 0..1, and divide by its standard deviation, in place."""
    return colours.sub_(MEAN).div_(STD)


def _grey(colours: Tensor) -> Tensor:
    red, green, blue = colours.unbind(1)
    return (red * _GREY[0]).add_(green, alpha=_GREY[1]).add_(blue, alpha=_GREY[2]).unsqueeze(1)


def _resized(pixels: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """Return `pixels`, shape (h, w, 3), as a tensor of shape (3, height, width)."""
    # The copy is contiguous and writable, as torch requires. The first axis comes before the permutation, or torch
    # would not recognise the channels-last format, which it resizes twice as fast.
    image = torch.from_numpy(pixels.copy())[None].permute(0, 3, 1, 2)
    if (height, width) == pixels.shape[:2]:
        return image[0]
    return interpolate(image, (height, width), mode="bilinear", antialias=True)[0]
