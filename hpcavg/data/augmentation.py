"""Random crops and flips of small images, a batch at a time. Shapes are (batch, channels, height, width)."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad


def crop_and_flip(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Return every image moved by up to `padding` pixels each way, zeros coming in, and half of them flipped.

    This is a random crop, of the size of the image, from the image in a frame of zeros (He et al., 2016,
    arXiv:1512.03385, section 4.2). `images` may have any dtype and be on any device, `generator` is on the CPU: three
    numbers are drawn for every image.
    """
    num_images, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, num_images), generator=generator)
    is_flipped = torch.randint(0, 2, (num_images,), generator=generator)
    framed_width = width + 2 * padding
    columns = torch.arange(width)
    ways = torch.stack([columns, columns.flip(0)])  # as they are, flipped
    pixels = (torch.arange(height)[:, None] * framed_width + ways[:, None]).view(2, -1)
    index = pixels[is_flipped] + (top * framed_width + left)[:, None]  # (batch, pixels) into the framed images
    framed = pad(images, (padding,) * 4).view(num_images, channels, -1)
    index = index.to(images.device)[:, None].expand(-1, channels, -1)
    return framed.gather(2, index).view(images.shape)
