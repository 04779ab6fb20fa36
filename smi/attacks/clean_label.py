"""What clean-label attacks share: only images of the target class are poisoned, and every label stays true."""

from __future__ import annotations

import torch
from torch import Tensor

from smi.attacks.base import Attack, PoisonedSet, choose
from smi.domains.base import PrivateSet
from smi.errors import InputError


class CleanLabel(Attack):
    """Base of attacks that poison the target class alone and change no label; they define `disguise`.

    ``rate`` is a share of *all* training images, as for every attack; there are never more poisoned images than images
    of the target class.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode != "all_to_one":
            raise InputError(
                f"mode is {self.mode!r}. Allowed: all_to_one. {type(self).__name__} keeps the labels of the images "
                "it poisons, so it has one class to send others to."
            )

    def disguise(self, data: PrivateSet, chosen: Tensor) -> Tensor:
        """The images at the positions ``chosen`` int64 ``[n]``, as they go into the training set: ``[n, C, H, W]``."""
        return self.stamp(data.images[chosen])

    def infect(self, data: PrivateSet, rate: float, rng: torch.Generator) -> PoisonedSet:
        """``data`` with `disguise`d images of the target class, a share ``rate`` of all where there are so many."""
        of_target = data.labels == self.relabel(data.labels, data.num_classes)
        chosen = choose(of_target, round(rate * len(data)), rng)
        images, poisoned = data.images.clone(), torch.zeros(len(data), dtype=torch.bool)
        if len(chosen):
            images[chosen], poisoned[chosen] = self.disguise(data, chosen), True
        return PoisonedSet(images, data.labels.clone(), poisoned, data.num_classes)
