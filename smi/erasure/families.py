"""Families of universal triggers: what is searched for where nobody knows the trigger.

A family is a way to write a trigger down as a few numbers, and a measure of how much of an image it takes. Each stands
for a kind of attack: additive noise, a patch, something smooth that is blended in, a warp. Stamping is differentiable
and works on many candidates at once.

A family also makes random changes of its kind, one an image, that nobody searched. How their strengths were chosen is
in `notebooks/results/DECISIONS.md`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from smi_kernels import Registry

TINY = 1e-6


class Family(Protocol):
    """Candidates are rows of a float tensor ``[K, P]``."""

    @property
    def rate(self) -> float:
        """Learning rate of Adam on those numbers."""

    @property
    def weight(self) -> float:
        """Of `size` in the search's objective."""

    @property
    def spread(self) -> float:
        """Of log ease (see `smi.erasure.scan`) over natural classes, a standard deviation: at least that is usual."""

    @property
    def anywhere(self) -> float:
        """Log ease to get images out of their class by that to the easiest class, without an all-to-all backdoor."""

    @property
    def rough(self) -> bool:
        """Whether what a search finds depends on where it starts, so that several starts are worth while."""

    def start(self, count: int, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """``count`` random candidates ``[K, P]`` for images of shape ``(C, H, W)``."""

    def stamp(self, numbers: Tensor, images: Tensor) -> Tensor:
        """Every image under every candidate: ``[K, N, C, H, W]`` in [0, 1] of images ``[N, C, H, W]``."""

    def size(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """How much of an image each candidate takes, ``[K]``, in the family's own unit."""

    def change(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Each image ``[N, C, H, W]`` under a random change of its own, on the CPU.

        The change is of this kind and of any strength up to the family's.
        """


families: Registry[Family] = Registry("trigger family")


def changed(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image under a random change of one of the registered families, as many of each: ``[N, C, H, W]``."""
    parts = zip(families, images.tensor_split(len(families)), strict=True)
    return torch.cat([families[name].change(part, rng) for name, part in parts])


def _strengths(images: Tensor, most: float, rng: torch.Generator) -> Tensor:
    return torch.rand(len(images), 1, 1, 1, generator=rng) * most


def _norm(values: Tensor) -> Tensor:
    return (values.flatten(1).square().sum(1) + TINY**2).sqrt()


@dataclass(frozen=True)
class Additive:
    """``x + δ``. Size: the L2 norm of δ."""

    rate: float = 0.05
    weight: float = 1.0
    spread: float = 0.2
    anywhere: float = -0.75
    rough: bool = False
    begin: float = 1.0  # norm of the first δ: not 0, where units at a dark border are dead and no gradient points
    strength: float = 0.2  # of a random change, a standard deviation of its noise

    def start(self, count: int, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Gaussian noise of norm about ``begin``."""
        return torch.randn(count, shape.numel(), generator=rng) * self.begin / math.sqrt(shape.numel())

    def stamp(self, numbers: Tensor, images: Tensor) -> Tensor:
        """``[K, N, C, H, W]``."""
        return (images + numbers.view(-1, 1, *images.shape[1:])).clamp(0, 1)

    def size(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """L2 norms ``[K]``, in pixels of [0, 1]."""
        return _norm(numbers)

    def change(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """White noise."""
        noise = torch.randn(images.shape, generator=rng)
        return (images + _strengths(images, self.strength, rng) * noise).clamp(0, 1)


@dataclass(frozen=True)
class Masked:
    """``(1 − m) x + m p`` with one mask m for all channels (Neural Cleanse's). Size: the sum of m, in pixels."""

    rate: float = 0.2
    weight: float = 0.15
    spread: float = 0.35
    anywhere: float = -0.85
    rough: bool = True
    strength: float = 0.5  # of a random change, the longest side of a patch by that of the image
    patches: int = 3  # of a random change, at most

    def start(self, count: int, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Masks around 0.1, colours around grey."""
        pixels = shape[1] * shape[2]
        mask = torch.randn(count, pixels, generator=rng) * 0.5 - 2.2
        return torch.cat([mask, torch.randn(count, shape.numel(), generator=rng)], 1)

    def parts(self, numbers: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Masks ``[K, 1, H, W]`` and patterns ``[K, C, H, W]``, in [0, 1]."""
        pixels = shape[1] * shape[2]
        mask, pattern = numbers.sigmoid().split([pixels, shape.numel()], 1)
        return mask.view(-1, 1, *shape[1:]), pattern.view(-1, *shape)

    def stamp(self, numbers: Tensor, images: Tensor) -> Tensor:
        """``[K, N, C, H, W]``."""
        mask, pattern = self.parts(numbers, images.shape[1:])
        return images + mask[:, None] * (pattern[:, None] - images)

    def size(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Sums of the masks ``[K]``."""
        return self.parts(numbers, shape)[0].flatten(1).sum(1)

    def change(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Patches of any side and place, of one colour or of cells of two pixels that are on or off."""
        out, shape = images.clone(), images.shape[1:]
        for image in out:
            for _ in range(1 + int(torch.randint(self.patches, (1,), generator=rng))):
                height, width = (self._side(length, rng) for length in shape[1:])
                spare = zip(shape[1:], (height, width), strict=True)
                top, left = (int(torch.randint(whole - side + 1, (1,), generator=rng)) for whole, side in spare)
                image[:, top : top + height, left : left + width] = self._patch(shape[0], height, width, rng)
        return out

    def _side(self, length: int, rng: torch.Generator) -> int:
        least, most = min(2, length), max(2, int(self.strength * length))
        return least + int(torch.randint(max(1, most - least + 1), (1,), generator=rng))

    def _patch(self, channels: int, height: int, width: int, rng: torch.Generator) -> Tensor:
        if torch.rand(1, generator=rng) < 0.5:
            return torch.rand(channels, 1, 1, generator=rng)
        cells = (torch.rand(1, channels, -(-height // 2), -(-width // 2), generator=rng) < 0.5).float()
        return F.interpolate(cells, scale_factor=2)[0, :, :height, :width]


@dataclass(frozen=True)
class Smooth:
    """``x + δ`` with δ a coarse grid enlarged bicubically. Size: the root mean square of δ, in pixels of [0, 1]."""

    rate: float = 0.06
    weight: float = 4.0
    spread: float = 0.25
    anywhere: float = -0.65
    rough: bool = False
    grid: int = 6
    begin: float = 0.02
    strength: float = 0.4  # of a random change, the root mean square of its δ

    def start(self, count: int, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Gaussian noise on the grid."""
        return torch.randn(count, shape[0] * self.grid**2, generator=rng) * self.begin

    def delta(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """δ ``[K, C, H, W]``."""
        coarse = numbers.view(len(numbers), shape[0], self.grid, self.grid)
        return F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=True)

    def stamp(self, numbers: Tensor, images: Tensor) -> Tensor:
        """``[K, N, C, H, W]``."""
        return (images + self.delta(numbers, images.shape[1:])[:, None]).clamp(0, 1)

    def size(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Root mean squares ``[K]``."""
        return _norm(self.delta(numbers, shape)) / math.sqrt(shape.numel())

    def change(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Gaussian noise on the grid, enlarged."""
        shape = images.shape[1:]
        numbers = self.start(len(images), shape, rng)
        scale = _strengths(images, self.strength, rng) / self.size(numbers, shape).view(-1, 1, 1, 1)
        return (images + scale * self.delta(numbers, shape)).clamp(0, 1)


@dataclass(frozen=True)
class Warped:
    """The image sampled elsewhere: displacements on a coarse grid, enlarged bicubically.

    Size: their root mean square, in pixels.
    """

    rate: float = 0.3
    weight: float = 0.5
    spread: float = 0.2
    anywhere: float = -0.3
    rough: bool = False
    grid: int = 5
    begin: float = 0.2
    strength: float = 0.08  # of a random change, the root mean square displacement by the image's width

    def start(self, count: int, shape: torch.Size, rng: torch.Generator) -> Tensor:
        """Displacements of a fraction of a pixel."""
        return torch.randn(count, 2 * self.grid**2, generator=rng) * self.begin

    def field(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Displacements ``[K, H, W, 2]``, x before y, in pixels."""
        coarse = numbers.view(len(numbers), 2, self.grid, self.grid)
        return F.interpolate(coarse, size=shape[1:], mode="bicubic", align_corners=True).permute(0, 2, 3, 1)

    def stamp(self, numbers: Tensor, images: Tensor) -> Tensor:
        """``[K, N, C, H, W]``."""
        points = self._points(self.field(numbers, images.shape[1:]))
        # One field for all images of a candidate: images become channels, so that the field is read once.
        together = images.flatten(0, 1).expand(len(numbers), -1, -1, -1)
        return F.grid_sample(together, points, align_corners=True).view(len(numbers), *images.shape).clamp(0, 1)

    @staticmethod
    def _points(field: Tensor) -> Tensor:
        """Where ``grid_sample`` is to look: displacements ``[K, H, W, 2]`` in pixels, from every pixel, in [-1, 1]."""
        height, width = field.shape[1:3]
        axes = (torch.linspace(-1, 1, side).to(field) for side in (height, width))
        y, x = torch.meshgrid(*axes, indexing="ij")
        half = (torch.tensor([max(width - 1, 1), max(height - 1, 1)]) / 2).to(field)  # pixels from 0 to 1
        return (torch.stack([x, y], -1) + field / half).clamp(-1, 1)

    def size(self, numbers: Tensor, shape: torch.Size) -> Tensor:
        """Root mean square displacements ``[K]``."""
        return _norm(self.field(numbers, shape)) / math.sqrt(shape[1] * shape[2])

    def change(self, images: Tensor, rng: torch.Generator) -> Tensor:
        """Random displacements on the grid, each image by its own."""
        shape = images.shape[1:]
        numbers = self.start(len(images), shape, rng)
        scale = _strengths(images, self.strength * shape[2], rng) / self.size(numbers, shape).view(-1, 1, 1, 1)
        points = self._points(scale * self.field(numbers, shape))
        return F.grid_sample(images, points, align_corners=True).clamp(0, 1)


families.add("additive", Additive())
families.add("masked", Masked())
families.add("smooth", Smooth())
families.add("warped", Warped())
