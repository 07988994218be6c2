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
    framed = pad(images, (padding,) * 4)
    framed_height, framed_width = framed.shape[2:]
    # Where the rows of the crops begin in memory, shape (batch, channels, height), and all rows that may begin there.
    firsts = torch.arange(num_images * channels).view(num_images, channels, 1) * framed_height + torch.arange(height)
    firsts = (firsts + top[:, None, None]) * framed_width + left[:, None, None]
    rows = framed.view(-1).as_strided((framed.numel() - width + 1, width), (1, 1))
    crops = rows.index_select(0, firsts.view(-1).to(images.device)).view(images.shape)
    turned = is_flipped.nonzero()[:, 0]
    # Copying whole images twice is several times as fast as writing to some of them in place.
    order = torch.arange(num_images).index_copy_(0, turned, num_images + torch.arange(len(turned)))
    flipped = crops.index_select(0, turned.to(images.device)).flip(3)
    return torch.cat([crops, flipped]).index_select(0, order.to(images.device))
