"""Differentiable augmentation of image batches, used by the classifier's and the GAN's training.

Small affine maps are one `grid_sample`; the GAN's translation and cutout follow Zhao et al., "Differentiable
Augmentation for Data-Efficient GAN Training" (NeurIPS 2020). Randomness comes from the generator passed in.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def random_affine(
    images: Tensor,
    rng: torch.Generator,
    *,
    degrees: float = 0.0,
    shift: float = 0.0,
    zoom: float = 0.0,
    flip: bool = False,
    outside: str = "zeros",
) -> Tensor:
    """Rotate by up to ``degrees``, shift by up to ``shift`` pixels, zoom by up to ``zoom`` (0.1: 90 to 110 %), mirror.

    Bilinear, differentiable.

    Args:
        images: ``[N, C, H, W]``; each image gets its own map.
        rng: Draws the maps; a CPU generator.
        degrees: Largest rotation, to either side.
        shift: Largest shift along each axis, in pixels.
        zoom: Largest relative change of size.
        flip: Whether half of the images are mirrored, left to right.
        outside: What is there, "zeros" or "reflection", as in `torch.nn.functional.grid_sample`.
    """
    n, _, height, _ = images.shape
    u = (torch.rand(n, 5, generator=rng) * 2 - 1).to(images)
    angle, scale = u[:, 0] * math.radians(degrees), 1 + u[:, 1] * zoom
    mirror = torch.where(u[:, 4] < 0, -1.0, 1.0) if flip else torch.ones_like(angle)
    theta = torch.zeros(n, 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * scale * mirror, -angle.sin() * scale
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * scale * mirror, angle.cos() * scale
    theta[:, :, 2] = u[:, 2:4] * (2 * shift / height)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode=outside, align_corners=False)


def random_crop_flip(images: Tensor, rng: torch.Generator, *, pad: int = 4, flip: bool = True) -> Tensor:
    """Shift by whole pixels, up to ``pad``, with reflection at the border, and mirror at random. ``[N, C, H, W]``."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    top, left = torch.randint(0, 2 * pad + 1, (2, n), generator=rng)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    cols = left[:, None] + torch.arange(width)
    if flip:
        cols = torch.where((torch.rand(n, 1, generator=rng) < 0.5), cols.flip(1), cols)
    return padded[
        torch.arange(n)[:, None, None, None], torch.arange(images.shape[1])[:, None, None], rows, cols[:, None, None]
    ]


def gan_augment(images: Tensor, rng: torch.Generator, *, shift: int = 3, hole: int = 10) -> Tensor:
    """What the critic sees of real and generated images alike: they are moved, and half of them get a hole.

    Differentiable in ``images``.

    Args:
        images: ``[N, C, H, W]``.
        rng: Draws shifts and holes; a CPU generator.
        shift: Translation by up to as many pixels along each axis.
        hole: Side of the square hole, in pixels.
    """
    n, channels, height, width = images.shape
    padded = F.pad(images, (shift,) * 4)
    top, left = torch.randint(0, 2 * shift + 1, (2, n), generator=rng)
    rows = (top[:, None] + torch.arange(height))[:, None, :, None]
    cols = (left[:, None] + torch.arange(width))[:, None, None, :]
    moved = padded[torch.arange(n)[:, None, None, None], torch.arange(channels)[:, None, None], rows, cols]
    cy, cx = torch.randint(0, height, (2, n, 1), generator=rng)
    inside_y = _within(torch.arange(height) - cy, hole)[:, :, None]
    inside_x = _within(torch.arange(width) - cx, hole)[:, None, :]
    holed = (torch.rand(n, 1, 1, generator=rng) < 0.5) & inside_y & inside_x
    return moved * (~holed[:, None]).to(moved)


def _within(offset: Tensor, length: int) -> Tensor:
    return (offset >= -(length // 2)) & (offset < length - length // 2)


def jitter(images: Tensor, rng: torch.Generator) -> Tensor:
    """Images as other people's scans or photographs of the same things, each with a map and a gamma of its own.

    Rotation up to 12°, shift up to 2 pixels, each side stretched by up to 20 %, a shear of up to 0.2, gamma from 0.5 to
    2. What distillation runs on, to cover more than the samples show.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        rng: Draws maps and gammas; a CPU generator.

    Returns:
        Images of the same shape, in [0, 1] too.
    """
    u = (torch.rand(len(images), 7, generator=rng) * 2 - 1).to(images)
    angle, shear = u[:, 0] * math.radians(12), u[:, 1] * 0.2
    wide, tall = 1 + u[:, 2] * 0.2, 1 + u[:, 3] * 0.2
    theta = torch.zeros(len(images), 2, 3, dtype=images.dtype, device=images.device)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * wide, (shear - angle.sin()) * wide
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * tall, angle.cos() * tall
    theta[:, :, 2] = u[:, 4:6] * (2 * 2 / images.shape[2])
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images, grid, align_corners=False).clamp(0, 1)
    return moved.pow(torch.exp(u[:, 6] * math.log(2)).view(-1, 1, 1, 1))
