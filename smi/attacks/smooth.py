"""Smooth trigger (Zeng et al., "Rethinking the Backdoor Attacks' Triggers: A Frequency Perspective", ICCV 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.attacks.base import attacks
from smi.attacks.optimised import AdditiveTrigger, Surrogate, descend, into_ball, noise
from smi.runtime.checks import check_number


@attacks.register("smooth")
@dataclass(frozen=True, kw_only=True)
class Smooth(AdditiveTrigger):
    """A universal perturbation δ ``[C, H, W]`` towards the target without high frequencies.

    ``min_δ E_x CE(f(x + δ), target)`` with ``δ = lowpass(δ)`` and ``‖δ‖₂ ≤ rms · √(C·H·W)``; other triggers show up as
    high frequencies in an image's spectrum, this one does not. The filter is ideal rather than Gaussian, so that using
    it after every step projects δ and does not fade it.

    Attributes:
        cutoff: In cycles over the shorter side of the image.
        rms: Largest root mean square of δ, in [0, 1] pixels.
    """

    cutoff: float = 4.0
    rms: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cutoff", self.cutoff, low=1)
        check_number("rms", self.rms, low=1e-3, high=1)

    def optimise(self, surrogate: Surrogate, images: Tensor, rng: torch.Generator) -> Tensor:
        """δ ``[C, H, W]`` with no frequency above ``cutoff``."""
        shape = images.shape[1:]
        bound = self.rms * math.sqrt(shape.numel())

        def loss(delta: Tensor, batch: Tensor) -> Tensor:
            _, logits = surrogate((batch + delta).clamp(0, 1))
            return F.cross_entropy(logits, torch.full((len(batch),), self.target))

        def project(delta: Tensor, done: float) -> Tensor:
            return into_ball(lowpass(delta, self.cutoff), bound)

        start = lowpass(noise(shape, 1.0, rng), self.cutoff)
        start = start * bound / start.norm()
        return descend(start, loss, project, images, steps=self.steps, lr=self.rms / 4, rng=rng)


def lowpass(delta: Tensor, cutoff: float) -> Tensor:
    """``delta`` ``[..., H, W]`` without the frequencies above ``cutoff``, in cycles over the shorter side."""
    height, width = delta.shape[-2:]
    fy, fx = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)  # in cycles per pixel
    kept = (fy[:, None].square() + fx.square()).sqrt() * min(height, width) <= cutoff + 1e-6
    return torch.fft.irfft2(torch.fft.rfft2(delta) * kept, s=(height, width))
