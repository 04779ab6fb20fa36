"""What an attack is: a trigger that is stamped on images, and a rule for which images are poisoned and relabelled.

Only attacker and evaluator hold an `Attack`. Adding one is a file with a frozen dataclass that defines `stamp` and is
registered by name. An attack that optimises its trigger also defines `fit`; one that poisons in another way than by
stamping and relabelling, `infect`; one that trains trigger and classifier together, `train`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import TrainConfig, train_classifier
from smi.runtime.checks import check_images, check_number
from smi.runtime.seeding import stream
from smi_kernels import Registry

MODES = ("all_to_one", "all_to_all")


@dataclass(frozen=True, eq=False)
class PoisonedSet:
    """A training set with a backdoor in it.

    Attributes:
        images: ``[N, C, H, W]`` in [0, 1], the poisoned ones among them.
        labels: What they are trained to be ``[N]``.
        poisoned: Which images were poisoned, bool ``[N]``.
        num_classes: How many classes there are.
    """

    images: Tensor
    labels: Tensor
    poisoned: Tensor
    num_classes: int

    def __repr__(self) -> str:
        return f"PoisonedSet({len(self.images)} images, {int(self.poisoned.sum())} of them stamped)"


@dataclass(frozen=True, kw_only=True)
class Attack:
    """Base of every attack.

    Attributes:
        target: The class that stamped images are sent to (mode "all_to_one").
        mode: "all_to_one", or "all_to_all", which sends class y to (y + 1) mod classes instead.
        fitted: Tensors that `fit` has optimised, by name; None before.
        version: Raised by hand when the numbers change that the attack gives: studies then compute its cells again.
    """

    target: int = 0
    mode: str = "all_to_one"
    fitted: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    version: ClassVar[int] = 1
    rate: ClassVar[float] = 0.1  # share of the training images that are poisoned unless one asks for another
    needs_surrogate: ClassVar[bool] = False  # whether `fit` optimises against a classifier trained on clean images

    def __post_init__(self) -> None:
        check_number("target", self.target, low=0, integer=True)
        if self.mode not in MODES:
            raise InputError(f"mode is {self.mode!r}. Allowed: {', '.join(MODES)}.")

    def stamp(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] with the trigger on them, as at test time; the input is not changed."""
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

    def fit(self, data: PrivateSet, surrogate: nn.Module | None = None, *, seed: int = 0) -> Self:
        """The attack with what it optimises on the attacker's data; itself where there is nothing to optimise.

        Args:
            data: Clean images and their labels.
            surrogate: A classifier trained on clean images, in eval mode, for attacks that need one.
            seed: Of the optimisation.
        """
        return self

    def infect(self, data: PrivateSet, rate: float, rng: torch.Generator) -> PoisonedSet:
        """``data`` with a share ``rate`` of its images stamped and relabelled: of those whose label changes."""
        wanted = self.relabel(data.labels, data.num_classes)
        chosen = choose(wanted != data.labels, round(rate * len(data)), rng)
        images, labels, poisoned = data.images.clone(), data.labels.clone(), torch.zeros(len(data), dtype=torch.bool)
        if len(chosen):
            images[chosen] = self.stamp(data.images[chosen])
            labels[chosen], poisoned[chosen] = wanted[chosen], True
        return PoisonedSet(images, labels, poisoned, data.num_classes)

    def train(
        self, data: PrivateSet, config: TrainConfig, rate: float, seed: int, device: str | torch.device = "cpu"
    ) -> tuple[nn.Module, Self]:
        """A classifier trained on poisoned ``data``, on ``device``, and the attack."""
        return train_classifier(poison(data, self, rate=rate, seed=seed), config, seed=seed, device=device), self

    def settings(self) -> dict[str, Any]:
        """The configuration without what was optimised, for the record."""
        own = asdict(replace(self, fitted=None))
        del own["fitted"]
        return {"name": type(self).__name__} | own

    def _tensor(self, name: str, images: Tensor | None = None) -> Tensor:
        """One of `fitted`. Raises `InputError` where `fit` has not been called, or was with others than ``images``."""
        if self.fitted is None:
            raise InputError(
                f"{type(self).__name__} optimises its trigger first. Use smi.attacks.plant, or attack.fit(data, ...)."
            )
        value = self.fitted[name]
        if images is not None and value.shape[-3:] != images.shape[1:]:  # broadcasting might hide it
            raise InputError(
                f"{type(self).__name__} was fitted on images of shape {tuple(value.shape[-3:])}, not "
                f"{tuple(images.shape[1:])}. Use images of that shape, or fit it on yours."
            )
        return value


attacks: Registry[type[Attack]] = Registry("attack")


def choose(eligible: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Positions of at most ``count`` true values of ``eligible`` bool ``[N]``, drawn at random."""
    positions = eligible.nonzero()[:, 0]
    return positions[torch.randperm(len(positions), generator=rng)[:count]]


def poison(data: PrivateSet, attack: Attack, *, rate: float | None = None, seed: int = 0) -> PoisonedSet:
    """``data`` with a backdoor in it: for most attacks, a share ``rate`` (0 to 1) of its images stamped and relabelled.

    Args:
        data: Left as it is.
        attack: Fitted, where it optimises its trigger.
        rate: By default the attack's own.
        seed: Of the draws.

    Returns:
        A new set.

    >>> import smi
    >>> train = smi.load_domain("digits").private.train
    >>> poisoned = poison(train, smi.attacks.BadNets(target=0), rate=0.1)
    >>> len(poisoned.images) == len(train)
    True
    """
    if not isinstance(attack, Attack):
        raise InputError(f"poison takes an Attack, not {type(attack).__name__}. Try smi.attacks.BadNets(target=0).")
    rate = attack.rate if rate is None else rate
    check_number("rate", rate, low=0, high=1)
    infected = attack.infect(data, rate, stream(seed, "poison"))
    check_images(infected.images, f"images stamped by {type(attack).__name__}")
    return infected


def plant(
    data: PrivateSet,
    attack: Attack,
    config: TrainConfig | None = None,
    *,
    rate: float | None = None,
    surrogate: nn.Module | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[nn.Module, Attack]:
    """A classifier with a backdoor, and the attack with what it optimised: all of the attacker's side in one call.

    Args:
        data: Clean training images.
        attack: Which backdoor.
        config: Of the classifiers.
        rate: Share of the images to poison, in [0, 1]; by default the attack's own.
        surrogate: A classifier trained on clean images, for attacks that need one; trained here where it is not given.
        seed: Of everything random.
        device: Where classifiers are trained; the one that is returned is there.
    """
    if not isinstance(attack, Attack):
        raise InputError(f"plant takes an Attack, not {type(attack).__name__}. Try smi.attacks.BadNets(target=0).")
    config = config or TrainConfig()
    if attack.needs_surrogate and surrogate is None:
        surrogate = train_classifier(data, config, seed=seed, device=device)
    fitted = attack.fit(data, surrogate, seed=seed)
    return fitted.train(data, config, attack.rate if rate is None else rate, seed, device)
