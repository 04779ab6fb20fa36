"""The square trigger of the trojaning attack (Liu et al., "Trojaning Attack on Neural Networks", NDSS 2018)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.attacks.badnets import BadNets
from smi.attacks.base import Attack, attacks
from smi.attacks.patterns import random_pattern
from smi.runtime.checks import check_number


@attacks.register("trojan_square")
@dataclass(frozen=True, kw_only=True)
class TrojanSquare(Attack):
    """A textured square t near the lower right corner: ``x' = x + m · opacity · (t − x)``, m its mask.

    The paper finds t by exciting chosen neurons of a given model; here it is a fixed random texture of many values
    (coloured on colour images), the form in which the square is used on data sets.

    Attributes:
        size: Of the square in pixels.
        margin: Its distance from the corner in pixels.
        opacity: In [0, 1]; 1 replaces what is under it.
        pattern_seed: Which texture.
    """

    size: int = 6
    margin: int = 1
    opacity: float = 1.0
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("size", self.size, low=1, integer=True)
        check_number("margin", self.margin, low=0, integer=True)
        check_number("opacity", self.opacity, low=0, high=1)
        check_number("pattern_seed", self.pattern_seed, low=0, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the square."""
        mask = BadNets(size=self.size, margin=self.margin).stamp(torch.zeros_like(images[:1]))  # checks that it fits
        texture = random_pattern(self.pattern_seed, "trojan square", images.shape[1], self.size).to(images)
        left, top = (side - self.size - self.margin for side in (images.shape[3], images.shape[2]))
        return images.lerp(F.pad(texture, (left, self.margin, top, self.margin)), mask * self.opacity)
