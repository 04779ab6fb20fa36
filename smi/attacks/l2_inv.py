"""Invisible backdoor with L2 regularisation (Li et al., 2019).

The paper is "Invisible Backdoor Attacks on Deep Neural Networks via Steganography and Regularization".
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from smi.attacks.base import attacks
from smi.attacks.optimised import NeuronTrigger, Surrogate, descend, into_ball, noise
from smi.runtime.checks import check_number

START = 3.0  # the first noise is this many times as long as the trigger may be in the end


@attacks.register("l2_inv")
@dataclass(frozen=True, kw_only=True)
class L2Inv(NeuronTrigger):
    """A faint additive δ ``[C, H, W]`` that drives neurons of the target class.

    ``min_δ Σ_j (A_j(x + δ) − c · A_j)²`` while ``‖δ‖₂`` shrinks to a bound: the paper's penalty ``λ‖δ‖₂``, run until
    the norm reaches a threshold, as a constraint.

    Attributes:
        rms: That bound is ``rms · √(C·H·W)``, rms in [0, 1] pixels.
    """

    rms: float = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rms", self.rms, low=1e-3, high=1)

    def optimise(self, surrogate: Surrogate, images: Tensor, rng: torch.Generator) -> Tensor:
        """δ ``[C, H, W]`` of norm at most ``rms · √(C·H·W)``."""
        shape = images.shape[1:]
        bound = self.rms * math.sqrt(shape.numel())

        def shrink(delta: Tensor, done: float) -> Tensor:
            return into_ball(delta, bound * (1 + (START - 1) * max(0.0, 1 - 2 * done)))

        start = noise(shape, START * self.rms, rng)
        delta = descend(
            start, self.distance(surrogate, images), shrink, images, steps=self.steps, lr=self.rms / 4, rng=rng
        )
        return into_ball(delta, bound).clamp(-1, 1)
