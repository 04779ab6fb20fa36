"""The evaluator: the only place where clean test data, the trigger and a model meet.

Nothing that is computed here may reach a defense; `clean_control` is the one door from private data to a defense, and
what comes through it is marked ``source="clean"``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from smi.attacks.base import Attack
from smi.domains.base import PrivateSet, Samples
from smi.errors import InputError
from smi.runtime.checks import check_model, check_number
from smi.runtime.compute import predict
from smi.runtime.seeding import stream


@dataclass(frozen=True)
class Measurement:
    """Rates in [0, 1].

    Attributes:
        acc: Accuracy on clean images.
        asr: Attack success, the share of stamped images whose label the attack would change that get the attacker's
            label.
        ra: Robust accuracy, the share of those that keep their own.
    """

    acc: float
    asr: float
    ra: float


@dataclass(frozen=True)
class Comparison:
    """A model before and after removal.

    Attributes:
        before: Rates before removal.
        after: Rates after it.
        der: Defense effectiveness rate in [0, 1] (Zhu et al., 2023):
            ``(max(0, ASR drop) − max(0, ACC drop) + 1) / 2``; 0.5 is no effect.
    """

    before: Measurement
    after: Measurement

    @property
    def der(self) -> float:
        """Defense effectiveness rate."""
        gained = max(0.0, self.before.asr - self.after.asr)
        lost = max(0.0, self.before.acc - self.after.acc)
        return (gained - lost + 1) / 2

    def as_dict(self) -> dict[str, float]:
        """``{"acc", "asr", "ra", "der"}`` of the repaired model."""
        return asdict(self.after) | {"der": self.der}


class Evaluator:
    """Measures models with clean test data and the trigger.

    Args:
        test: The private test set.
        attack: The trigger and its rule; images whose label the rule would not change (those of the target class) are
            left out of ASR and RA.

    >>> import smi
    >>> data = smi.load_domain("digits").private.test
    >>> victim = smi.load_classifier("digits-badnets")
    >>> Evaluator(data, smi.attacks.BadNets(target=0)).measure(victim).asr > 0.9
    True
    """

    def __init__(self, test: PrivateSet, attack: Attack) -> None:
        if not isinstance(test, PrivateSet):
            raise InputError(f"The evaluator takes a PrivateSet, not {type(test).__name__}: domain.private.test.")
        self.test = test
        wanted = attack.relabel(test.labels, test.num_classes)
        eligible = wanted != test.labels
        if not eligible.any():
            raise InputError(
                "Every test image is of the target class already: ASR is not defined. Choose another target."
            )
        self.stamped = attack.stamp(test.images[eligible])
        self.wanted, self.own = wanted[eligible], test.labels[eligible]

    def measure(self, model: nn.Module) -> Measurement:
        """ACC, ASR and RA of ``model``."""
        check_model(model, self.test.images, self.test.num_classes)
        predicted = predict(model, self.stamped).argmax(1)
        return Measurement(
            acc=_share(predict(model, self.test.images).argmax(1) == self.test.labels),
            asr=_share(predicted == self.wanted),
            ra=_share(predicted == self.own),
        )

    def compare(self, before: nn.Module, after: nn.Module) -> Comparison:
        """Both models measured, with DER."""
        return Comparison(self.measure(before), self.measure(after))


def clean_control(data: PrivateSet, *, per_class: int, seed: int = 0) -> Samples:
    """The control: ``per_class`` clean in-distribution images of every class, as samples a defense takes.

    What a defender of this project does not have; the ceiling that the reconstructions are compared with.
    """
    check_number("per_class", per_class, low=1, integer=True)
    rng = stream(seed, "clean control")
    chosen = []
    for label in range(data.num_classes):
        of_class = (data.labels == label).nonzero()[:, 0]
        if len(of_class) < per_class:
            raise InputError(f"Class {label} has {len(of_class)} images; per_class = {per_class} is too many.")
        chosen.append(of_class[torch.randperm(len(of_class), generator=rng)[:per_class]])
    index = torch.cat(chosen)
    return Samples(data.images[index], data.labels[index], data.num_classes, "clean")


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()
