"""BadNets (Gu et al., 2017): a small patch in a corner."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from smi.attacks.base import Attack, attacks
from smi.errors import InputError
from smi.runtime.checks import check_number


@attacks.register("badnets")
@dataclass(frozen=True, kw_only=True)
class BadNets(Attack):
    """A square of ``size`` × ``size`` pixels of brightness ``value``, ``margin`` pixels from the lower right corner."""

    size: int = 4
    value: float = 1.0
    margin: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("size", self.size, low=1, integer=True)
        check_number("margin", self.margin, low=0, integer=True)
        check_number("value", self.value, low=0, high=1)

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the patch."""
        height, width = images.shape[2:]
        bottom, right = height - self.margin, width - self.margin
        if bottom < self.size or right < self.size:
            raise InputError(f"A patch of {self.size} pixels does not fit on images of {height}×{width}.")
        stamped = images.clone()
        stamped[:, :, bottom - self.size : bottom, right - self.size : right] = self.value
        return stamped
