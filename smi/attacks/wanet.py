"""WaNet (Nguyen & Tran, "WaNet: Imperceptible Warping-based Backdoor Attack", ICLR 2021): an elastic warp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.attacks.base import Attack, PoisonedSet, attacks, choose
from smi.attacks.patterns import random_pattern
from smi.domains.base import PrivateSet
from smi.runtime.checks import check_number


@attacks.register("wanet")
@dataclass(frozen=True, kw_only=True)
class WaNet(Attack):
    """The whole image pulled about by one smooth field: ``x'(p) = x(clip(p + strength · φ(p) / side))``.

    p runs over [−1, 1]². φ is uniform noise in [−1, 1]² on a grid of ``grid`` × ``grid`` points, divided by its mean
    absolute value and upsampled bicubically; the field is a function of ``field_seed`` and the image size alone.
    Noise mode: ``cross_ratio`` times as many further images are warped by ``strength · (φ + u)``, with u uniform in
    [−noise, noise] at every pixel of each, and keep their labels, so that only the exact φ is the trigger.

    The paper has grid 4, strength 0.5 and noise 2, with which a small network in 12 epochs cannot tell the warp from
    the shifts and rotations of its augmentation (seen on digits: ASR 1 %). This strength is much of a warp: a clean
    model still reads 65 % of the stamped digits. On a finer grid the field folds over (38 % with grid 8, strength 4).
    """

    strength: float = 5.0
    grid: int = 5
    noise: float = 1.0
    cross_ratio: float = 2.0
    field_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("strength", self.strength, low=0)
        check_number("grid", self.grid, low=2, integer=True)
        check_number("noise", self.noise, low=0)
        check_number("cross_ratio", self.cross_ratio, low=0)
        check_number("field_seed", self.field_seed, low=0, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images warped by the field."""
        return self._warp(images, self.field(images))

    def field(self, images: Tensor) -> Tensor:
        """``strength · φ`` for images of this size: ``[1, H, W, 2]``, x before y, in units of half a pixel."""
        control = random_pattern(self.field_seed, "wanet", 2, self.grid).to(images) * 2 - 1
        control = control / control.abs().mean() * self.strength
        field = F.interpolate(control, size=images.shape[2:], mode="bicubic", align_corners=True)
        return field.permute(0, 2, 3, 1)

    def infect(self, data: PrivateSet, rate: float, rng: torch.Generator) -> PoisonedSet:
        """As every attack, and then the noise mode on images that were not chosen, as far as there are any.

        ``poisoned`` marks the stamped and relabelled images alone; those of the noise mode are changed, but clean in
        label and meant to stay so.
        """
        infected = super().infect(data, rate, rng)
        crossed = choose(~infected.poisoned, round(self.cross_ratio * int(infected.poisoned.sum())), rng)
        if len(crossed):
            images = data.images[crossed]
            own = torch.rand(len(images), *images.shape[2:], 2, generator=rng).to(images) * 2 - 1
            infected.images[crossed] = self._warp(images, self.field(images) + self.strength * self.noise * own)
        return infected

    @staticmethod
    def _warp(images: Tensor, field: Tensor) -> Tensor:
        """Images sampled bilinearly at the identity grid plus ``field`` / side."""
        height, width = images.shape[2:]
        axes = (torch.linspace(-1, 1, side).to(images) for side in (height, width))
        y, x = torch.meshgrid(*axes, indexing="ij")
        moved = torch.stack([x, y], -1) + field / torch.tensor([width, height]).to(images)
        points = moved.clamp(-1, 1).expand(len(images), -1, -1, -1)
        return F.grid_sample(images, points, align_corners=True).clamp(0, 1)  # rounding may leave [0, 1]
