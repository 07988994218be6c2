"""Random crops and flips of small images, a batch at a time."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad


def crop_and_flip(images: Tensor, padding: int, generator: Generator) -> Tensor:
    """Return the images, each shifted by up to `padding` pixels in both directions, half of them flipped.

    This is a random crop of an image in a frame of zeros (He et al., 2016, arXiv:1512.03385, section 4.2).

    Parameters
    ----------
    images : Tensor
        Shape (batch, channels, height, width), any dtype and device.
    padding : int
        Width of the frame in pixels.
    generator : torch.Generator
        On the CPU. Three numbers are drawn for every image.

    Examples
    --------
    >>> import torch
    >>> from hpcavg.data.augmentation import crop_and_flip
    >>> images = torch.zeros(8, 3, 32, 32, dtype=torch.uint8)
    >>> crop_and_flip(images, 4, torch.Generator().manual_seed(0)).shape
    torch.Size([8, 3, 32, 32])
    """
    num_images, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, num_images), generator=generator)
    is_flipped = torch.randint(0, 2, (num_images,), generator=generator)
    framed = pad(images, (padding,) * 4)
    framed_height, framed_width = framed.shape[2:]
    # The offsets of the crops' rows in memory, shape (batch, channels, height), and a view of the rows at all offsets.
    firsts = torch.arange(num_images * channels).view(num_images, channels, 1) * framed_height + torch.arange(height)
    firsts = (firsts + top[:, None, None]) * framed_width + left[:, None, None]
    rows = framed.view(-1).as_strided((framed.numel() - width + 1, width), (1, 1))
    crops = rows.index_select(0, firsts.view(-1).to(images.device)).view(images.shape)
    turned = is_flipped.nonzero()[:, 0]
    # Two copies of whole images are several times as fast as writing to some of them in place.
    order = torch.arange(num_images).index_copy_(0, turned, num_images + torch.arange(len(turned)))
    flipped = crops.index_select(0, turned.to(images.device)).flip(3)
    return torch.cat([crops, flipped]).index_select(0, order.to(images.device))
