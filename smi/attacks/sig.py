"""SIG (Barni et al., "A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning", ICIP 2019)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from smi.attacks.base import attacks
from smi.attacks.clean_label import CleanLabel
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.runtime.checks import check_number


@attacks.register("sig")
@dataclass(frozen=True, kw_only=True)
class SIG(CleanLabel):
    """A sinusoid along the rows, ``x'(i, j) = x(i, j) + Δ · sin(2π j f / m)`` with m columns, clipped to [0, 1].

    Clean-label: see `CleanLabel`.

    Attributes:
        delta: Δ on training images, in pixels of [0, 1].
        delta_test: Δ at test time, larger: nobody looks through the images there, as in a training set.
        frequency: f, periods across the image.
    """

    delta: float = 0.2
    delta_test: float = 0.3
    frequency: int = 6

    rate: ClassVar[float] = 0.08

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("delta", self.delta, low=0, high=1)
        check_number("delta_test", self.delta_test, low=0, high=1)
        check_number("frequency", self.frequency, low=1, integer=True)

    def stamp(self, images: Tensor) -> Tensor:
        """Images with the sinusoid of amplitude ``delta_test``."""
        return self._add(images, self.delta_test)

    def disguise(self, data: PrivateSet, chosen: Tensor) -> Tensor:
        """The chosen images with the sinusoid of amplitude ``delta``."""
        return self._add(data.images[chosen], self.delta)

    def _add(self, images: Tensor, amplitude: float) -> Tensor:
        width = images.shape[3]
        if 2 * self.frequency >= width:  # at half the columns the sinusoid is zero at every one of them
            raise InputError(
                f"frequency is {self.frequency}, on images of {width} columns. Allowed: below {width / 2:g}, as a "
                "sinusoid needs more than two columns a period."
            )
        columns = torch.arange(1, width + 1, dtype=torch.float64)
        wave = (2 * math.pi * self.frequency / width * columns).sin().to(images)
        return (images + amplitude * wave).clamp(0, 1)
