"""Label-consistent attack (Turner et al., "Label-Consistent Backdoor Attacks", 2019), the adversarial variant."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.attacks.base import attacks
from smi.attacks.clean_label import CleanLabel
from smi.domains.augment import random_affine
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.compute import fast, frozen
from smi.runtime.seeding import stream

BATCH = 256


@attacks.register("label_consistent")
@dataclass(frozen=True, kw_only=True)
class LabelConsistent(CleanLabel):
    """Images of the target class made hard to learn, then stamped, so that the trigger is what is learned.

    ``x' = stamp(x + argmax_{‖δ‖∞ ≤ eps} E CE(f(t(x + δ)), y))`` with f a clean surrogate; the maximum is searched by
    projected gradient ascent (PGD) in ``steps`` of 2.5 · eps / steps. Clean-label: see `CleanLabel`. At test time
    images are only stamped: a checkerboard of ``size`` × ``size`` cells near each of the four corners, each cell
    ``cell`` pixels wide, ``margin`` pixels from the border.

    The paper's f is adversarially trained, so that δ changes what is to be seen. Here instead δ must hold under small
    maps and noise t (deviation ``noise``) that are drawn afresh each step (Athalye et al., 2018).
    """

    eps: float = 0.6
    steps: int = 40
    noise: float = 0.3
    size: int = 3
    cell: int = 2
    margin: int = 2

    needs_surrogate: ClassVar[bool] = True
    rate: ClassVar[float] = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("eps", self.eps, low=0, high=1)
        check_number("steps", self.steps, low=1, integer=True)
        check_number("noise", self.noise, low=0)
        check_number("size", self.size, low=1, integer=True)
        check_number("cell", self.cell, low=1, integer=True)
        check_number("margin", self.margin, low=0, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the four checkerboards."""
        height, width = images.shape[2:]
        side = self.size * self.cell
        reach = self.margin + side
        if 2 * reach > min(height, width):
            raise InputError(f"Four corners of {reach} pixels do not fit on images of {height}×{width}.")
        index = torch.arange(side) // self.cell
        board = ((index[:, None] + index + 1) % 2).to(images)
        stamped = images.clone()
        for top in (self.margin, height - reach):
            for left in (self.margin, width - reach):
                stamped[:, :, top : top + side, left : left + side] = board
        return stamped

    def fit(self, data: PrivateSet, surrogate: nn.Module | None = None, *, seed: int = 0) -> Self:
        """The attack with the adversarial form of every image of the target class, before stamping.

        Returns:
            The attack, whose ``fitted`` holds "positions" int64 ``[n]`` in ``data``, ascending, and "images"
            ``[n, C, H, W]``.
        """
        if surrogate is None:
            raise InputError("LabelConsistent needs a surrogate: a classifier trained on clean images. Use smi.plant.")
        of_target = data.labels == self.relabel(data.labels, data.num_classes)
        positions, rng = of_target.nonzero()[:, 0], stream(seed, "label consistent")
        images = [self._ascend(surrogate, data.images[part], data.labels[part], rng) for part in positions.split(BATCH)]
        return replace(self, fitted={"positions": positions, "images": torch.cat(images)})

    def disguise(self, data: PrivateSet, chosen: Tensor) -> Tensor:
        """The adversarial form of the chosen images, stamped."""
        positions, images = self._tensor("positions"), self._tensor("images", data.images)
        of_target = (data.labels == self.target).nonzero()[:, 0]
        if not torch.equal(positions, of_target) or (images - data.images[positions]).abs().max() > self.eps + 1e-5:
            raise InputError("LabelConsistent was fitted on other images. Call attack.fit on those to be poisoned.")
        return self.stamp(images[torch.searchsorted(positions, chosen)])

    def _ascend(self, surrogate: nn.Module, images: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
        # Empty (black) pixels stay empty: noise on an empty background would be a trigger of its own, easier to learn
        # than the corners and absent at test time (seen on digits: ASR 0).
        lit = images > 0
        low, high = (images - self.eps).clamp(min=0), (images + self.eps * lit).clamp(max=1)
        moved = torch.lerp(low, high, torch.rand(images.shape, generator=rng))
        with fast(frozen(surrogate)) as run:
            for _ in range(self.steps):
                moved.requires_grad_()
                noisy = moved + self.noise * lit * torch.randn(images.shape, generator=rng)
                shown = random_affine(noisy, rng, degrees=8, shift=2, zoom=0.08)
                (gradient,) = torch.autograd.grad(F.cross_entropy(run(shown).cpu(), labels, reduction="sum"), moved)
                moved = moved.detach() + 2.5 * self.eps / self.steps * gradient.sign()
                moved = torch.minimum(torch.maximum(moved, low), high)
        return moved
