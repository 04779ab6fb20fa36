"""Blended injection (Chen et al., "Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning", 2017)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smi.attacks.base import Attack, attacks
from smi.attacks.patterns import smooth_pattern
from smi.runtime.checks import check_number


@attacks.register("blended")
@dataclass(frozen=True, kw_only=True)
class Blended(Attack):
    """A fixed random picture k mixed into the whole image: ``x' = (1 − alpha) · x + alpha · k``.

    Attributes:
        alpha: Weight of the picture, in [0, 1].
        cells: How many random blobs k has along each side (the more, the finer).
        pattern_seed: Which picture.
    """

    alpha: float = 0.15
    cells: int = 8
    pattern_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, low=0, high=1)
        check_number("cells", self.cells, low=2, integer=True)
        check_number("pattern_seed", self.pattern_seed, low=0, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the picture mixed in."""
        return images.lerp(smooth_pattern(self.pattern_seed, "blended", images, self.cells), self.alpha)
