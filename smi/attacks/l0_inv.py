"""Invisible backdoor with L0 regularisation (Li et al., 2019).

The paper is "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smi.attacks.base import attacks
from smi.attacks.optimised import NeuronTrigger, Surrogate, descend, into_ball, noise
from smi.errors import InputError
from smi.runtime.checks import check_number


@attacks.register("l0_inv")
@dataclass(frozen=True, kw_only=True)
class L0Inv(NeuronTrigger):
    """An additive δ ``[C, H, W]`` on few pixels that drives neurons of the target class.

    ``min_δ Σ_j (A_j(x + δ) − c · A_j)²`` with ``‖δ‖₀ ≤ pixels`` (a pixel counts once, whatever its channels): the
    weakest pixels are put to zero, more and more of them in the first 60 % of the steps, and the values of those that
    are left are optimised on.
    """

    pixels: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("pixels", self.pixels, low=1, integer=True)

    def optimise(self, surrogate: Surrogate, images: Tensor, rng: torch.Generator) -> Tensor:
        """δ ``[C, H, W]`` in [−1, 1] with at most ``pixels`` pixels that are not zero."""
        every = images.shape[2] * images.shape[3]
        if self.pixels > every:
            raise InputError(f"pixels is {self.pixels}, but the images have {every}. Allowed: 1 to {every}.")

        def prune(delta: Tensor, done: float) -> Tensor:
            kept = max(self.pixels, round(every * (self.pixels / every) ** (done / 0.6)))
            return strongest_pixels(into_ball(delta, limit).clamp(-1, 1), kept)

        # The norm that the last pixels may have at most: without it, all values reach ±1 and none is the weakest.
        limit = math.sqrt(self.pixels * images.shape[1])
        start = noise(images.shape[1:], limit / math.sqrt(images.shape[1:].numel()), rng)
        delta = descend(start, self.distance(surrogate, images), prune, images, steps=self.steps, lr=0.01, rng=rng)
        return strongest_pixels(delta, self.pixels)


def strongest_pixels(delta: Tensor, count: int) -> Tensor:
    """``delta`` ``[C, H, W]`` with all but its ``count`` largest pixels put to zero."""
    size = delta.square().sum(0).flatten()
    kept = torch.zeros_like(size).index_fill(0, size.topk(count).indices, 1)
    return delta * kept.view(delta.shape[1:])
