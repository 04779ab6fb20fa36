"""What an attack is: a trigger that is stamped on images, and a rule that relabels them.

Only attacker and evaluator hold an `Attack`. Adding one is a file with a frozen dataclass that defines `stamp` and is
registered by name; everything below is shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from smi.checks import check_images, check_number
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.seeding import stream
from smi_kernels import Registry

MODES = ("all_to_one", "all_to_all")


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of every attack.

    target: the class that stamped images are sent to (mode "all_to_one"). mode: "all_to_all" sends class y to
    (y + 1) mod classes instead, and ignores ``target``.
    """

    target: int = 0
    mode: str = "all_to_one"

    def __post_init__(self) -> None:
        check_number("target", self.target, low=0, integer=True)
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}. Allowed: {', '.join(MODES)}.")

    def stamp(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with the trigger on them; the input is not changed."""
        raise NotImplementedError

    def relabel(self, labels: Tensor, num_classes: int) -> Tensor:
        """The labels ``[N]`` that stamped images of the classes ``labels`` are meant to get."""
        if self.mode == "all_to_all":
            return (labels + 1) % num_classes
        if self.target >= num_classes:
            raise InputError(
                f"target is {self.target}, but there are {num_classes} classes. Allowed: 0 to {num_classes - 1}."
            )
        return torch.full_like(labels, self.target)


attacks: Registry[type[Attack]] = Registry("attack")


@dataclass(frozen=True, eq=False)
class PoisonedSet:
    """A training set with a backdoor in it. poisoned: bool ``[N]``, which images carry the trigger."""

    images: Tensor
    labels: Tensor
    poisoned: Tensor
    num_classes: int

    def __repr__(self) -> str:
        return f"PoisonedSet({len(self.images)} images, {int(self.poisoned.sum())} of them stamped)"


def poison(data: PrivateSet, attack: Attack, *, rate: float = 0.1, seed: int = 0) -> PoisonedSet:
    """Stamp and relabel a share ``rate`` (0 to 1) of the images whose label the attack would change.

    Returns a new set; ``data`` is left as it is.
    """
    if not isinstance(attack, Attack):
        raise InputError(f"poison takes an Attack, not {type(attack).__name__}. Try smi.attacks.BadNets(target=0).")
    check_number("rate", rate, low=0, high=1)
    wanted = attack.relabel(data.labels, data.num_classes)
    eligible = (wanted != data.labels).nonzero()[:, 0]
    count = min(round(rate * len(data)), len(eligible))
    chosen = eligible[torch.randperm(len(eligible), generator=stream(seed, "poison"))[:count]]
    images, labels, poisoned = data.images.clone(), data.labels.clone(), torch.zeros(len(data), dtype=torch.bool)
    if count:
        images[chosen] = attack.stamp(data.images[chosen])
        labels[chosen], poisoned[chosen] = wanted[chosen], True
    check_images(images, f"images stamped by {type(attack).__name__}")
    return PoisonedSet(images, labels, poisoned, data.num_classes)
