"""Perturbed images in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from smi_kernels.noise import INPUT, Family, draw
from smi_kernels.ops.launch import Draws


def perturb_input(
    images: Tensor, *, sigma: float, family: Family, which: Draws, dtype: torch.dtype = torch.float32
) -> Tensor:
    """clamp(x + σ δ_k, 0, 1) for every draw, ``[draws·N, C, H, W]``, channels_last."""
    drawn = (draw(family, {0: images.shape[1:]}, device=images.device, **vars(one))[0] for one in which.each(INPUT))
    moved = torch.cat([(images + sigma * delta).clamp(0, 1) for delta in drawn])
    return moved.to(dtype, memory_format=torch.channels_last)
