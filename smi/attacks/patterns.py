"""Fixed random pictures that triggers are made of: functions of a seed alone, the same on every image."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.runtime.seeding import stream


def random_pattern(seed: int, name: str, channels: int, cells: int) -> Tensor:
    """Values uniform in [0, 1], float32 ``[1, channels, cells, cells]``, from the stream ``name`` of ``seed``."""
    return torch.rand(1, channels, cells, cells, generator=stream(seed, name))


def smooth_pattern(seed: int, name: str, like: Tensor, cells: int) -> Tensor:
    """A random picture in [0, 1], ``[1, C, H, W]`` as the images ``like``, made of ``cells`` × ``cells`` soft blobs.

    The blobs are interpolated bilinearly, so that a small rotation or shift of the picture leaves them recognisable.
    """
    coarse = random_pattern(seed, name, like.shape[1], cells)
    picture = F.interpolate(coarse, size=like.shape[2:], mode="bilinear", align_corners=True)
    return picture.clamp(0, 1).to(like)  # rounding may leave [0, 1]
