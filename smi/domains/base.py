"""What a domain is, and the types that keep the evaluator's data away from the defender.

A *domain* is one image-classification setting. Its **private** side (`PrivateSet`) is what the backdoored classifier
was trained and is tested on: only the evaluator may use it. Its **public** side (`PublicImages`) is unlabelled, comes
from elsewhere, and is all the defender has besides the model. Defenses take `Samples`; neither a `PrivateSet` nor a
trigger is one, and passing either raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from smi.checks import check_images, check_labels
from smi.errors import InputError


@dataclass(frozen=True, eq=False)
class PrivateSet:
    """Labelled in-distribution images, for the evaluator only.

    images: float32 ``[N, C, H, W]`` in [0, 1]. labels: int64 ``[N]`` in ``[0, num_classes)``.
    """

    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        check_images(self.images, "private images")
        check_labels(self.labels, len(self.images), self.num_classes, "private labels")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"PrivateSet({len(self)} images of {self.num_classes} classes, {tuple(self.images.shape[1:])})"


@dataclass(frozen=True, eq=False)
class PublicImages:
    """Unlabelled images that anyone may have. images: float32 ``[N, C, H, W]`` in [0, 1]."""

    images: Tensor

    def __post_init__(self) -> None:
        check_images(self.images, "public images")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"PublicImages({len(self)} images, {tuple(self.images.shape[1:])})"


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images that a defense may use, and where they came from.

    images: float32 ``[N, C, H, W]`` in [0, 1]. labels: int64 ``[N]``. source: for the record ("smi", "latent",
    "public", "clean", ...). scores: float32 ``[N]`` stability (lower is more stable), where it was measured.
    """

    images: Tensor
    labels: Tensor
    num_classes: int
    source: str
    scores: Tensor | None = None

    def __post_init__(self) -> None:
        check_images(self.images, f"{self.source} samples")
        check_labels(self.labels, len(self.images), self.num_classes, f"labels of the {self.source} samples")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"Samples({len(self)} {self.source} images of {self.num_classes} classes, {tuple(self.images.shape[1:])})"

    def select(self, index: Tensor) -> Self:
        """The samples at ``index`` (int64 positions or a boolean mask)."""
        scores = None if self.scores is None else self.scores[index]
        return type(self)(self.images[index], self.labels[index], self.num_classes, self.source, scores)


class PrivateData:
    """The private side of a domain: ``train`` (the attacker's) and ``test`` (the evaluator's).

    `forget` drops both; afterwards any access raises. The pipeline's tests call it before the defense runs.
    """

    def __init__(self, train: PrivateSet, test: PrivateSet) -> None:
        self._train: PrivateSet | None = train
        self._test: PrivateSet | None = test

    @property
    def train(self) -> PrivateSet:
        """What the attacker poisons and trains on."""
        return self._present(self._train)

    @property
    def test(self) -> PrivateSet:
        """What the evaluator measures on."""
        return self._present(self._test)

    def forget(self) -> None:
        """Delete the private data."""
        self._train = self._test = None

    @staticmethod
    def _present(part: PrivateSet | None) -> PrivateSet:
        if part is None:
            raise InputError(
                "This domain has no private data. It is needed to train a victim or to evaluate; a defense never "
                "needs it. Load a domain with labelled images, such as 'digits'."
            )
        return part

    def __repr__(self) -> str:
        return "PrivateData(none)" if self._train is None else f"PrivateData(train={self.train}, test={self.test})"


@dataclass(frozen=True, eq=False)
class Domain:
    """One setting: private data for attacker and evaluator, public images for the defender, class names."""

    name: str
    classes: tuple[str, ...]
    private: PrivateData
    public: PublicImages

    @property
    def num_classes(self) -> int:
        """Number of classes of the private task."""
        return len(self.classes)

    def __repr__(self) -> str:
        return f"Domain({self.name!r}, {self.num_classes} classes, {self.private}, {self.public})"


def private_set(images: Tensor, labels: Tensor, classes: Sequence[str]) -> PrivateSet:
    """A `PrivateSet` from uint8 or float images ``[N, C, H, W]`` and integer labels ``[N]``."""
    return PrivateSet(as_float(images), labels.to(torch.int64), len(classes))


def as_float(images: Tensor) -> Tensor:
    """uint8 images become float32 in [0, 1]; float images are returned as float32."""
    return images.float() / 255 if images.dtype == torch.uint8 else images.float()
