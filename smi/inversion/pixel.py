"""Pixel inversion, the baseline: optimise the pixels themselves, smoothed by total variation.

Model inversion after Fredrikson et al. (CCS 2015) with the total-variation prior of Mahendran & Vedaldi (CVPR 2015).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.inversion.base import Inversion, Task, inversions
from smi.runtime.checks import check_number


@inversions.register("pixel")
@dataclass(frozen=True, kw_only=True)
class Pixel(Inversion):
    """Minimise ``CE(f(x), y) + lambda_tv · TV(x)`` over x in [0, 1]; the prior gives the image shape only."""

    lr: float = 0.05
    lambda_tv: float = 2.0

    name = "pixel"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_tv", self.lambda_tv, low=0)

    def start(self, task: Task) -> Tensor:
        """Uniform noise ``[N, C, H, W]``."""
        return torch.rand(len(task.labels), *task.prior.image_shape, generator=task.rng)

    def render(self, variable: Tensor, task: Task) -> Tensor:
        """The pixels themselves."""
        return variable

    def objective(self, images: Tensor, variable: Tensor, task: Task) -> Tensor:
        """Identity and smoothness."""
        return F.cross_entropy(task.run(images), task.labels) + self.lambda_tv * total_variation(images).mean()

    def project(self, variable: Tensor) -> None:
        """Keep pixels in [0, 1]."""
        variable.clamp_(0, 1)


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels ``[N]``, anisotropic."""
    down = (images[:, :, 1:] - images[:, :, :-1]).abs().flatten(1).mean(1)
    right = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().flatten(1).mean(1)
    return down + right
