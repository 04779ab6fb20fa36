"""What a domain is, and the types that keep the evaluator's data away from the defender.

A *domain* is one image-classification setting. Its **private** side (`PrivateSet`) is what the backdoored classifier
was trained and is tested on: only the evaluator may use it. Its **public** side (`PublicImages`) is unlabelled, comes
from elsewhere, and is all the defender has besides the model. Defenses take `Samples`; neither a `PrivateSet` nor a
trigger is one, and passing either raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.errors import InputError
from smi.runtime.checks import check_images, check_labels


def fitted(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images ``[N, C, H, W]`` as ``shape`` (C, H, W), differentiable.

    They are resized, and become grey from colour (by luminance) or three equal channels.
    """
    channels, *size = shape
    if channels != images.shape[1]:
        weights = images.new_tensor(LUMINANCE).view(1, 3, 1, 1)
        grey = (images * weights).sum(1, keepdim=True) if images.shape[1] == 3 else images
        images = grey.expand(-1, channels, -1, -1)
    if list(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


LUMINANCE = (0.299, 0.587, 0.114)  # of red, green and blue (ITU-R BT.601), as Pillow turns colours into grey


@dataclass(frozen=True, eq=False)
class PrivateSet:
    """Labelled in-distribution images, for the evaluator only.

    Attributes:
        images: Float32 ``[N, C, H, W]`` in [0, 1].
        labels: Int64 ``[N]`` in ``[0, num_classes)``.
        num_classes: How many classes there are.
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
    """Unlabelled images that anyone may have.

    Attributes:
        images: Float32 ``[N, C, H, W]`` in [0, 1].
    """

    images: Tensor

    def __post_init__(self) -> None:
        check_images(self.images, "public images")

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"PublicImages({len(self)} images, {tuple(self.images.shape[1:])})"

    def fitted(self, shape: tuple[int, int, int]) -> PublicImages:
        """The same images as ``shape`` (C, H, W), see `fitted`."""
        return PublicImages(fitted(self.images, shape).clamp(0, 1).contiguous())


@dataclass(frozen=True, eq=False)
class Samples:
    """Labelled images that a defense may use, and where they came from.

    Attributes:
        images: Float32 ``[N, C, H, W]`` in [0, 1].
        labels: Int64 ``[N]`` in ``[0, num_classes)``.
        num_classes: How many classes there are.
        source: For the record ("smi", "latent", "public", "clean", ...).
        scores: Float32 ``[N]`` stability (lower is more stable), where it was measured.
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
        return (
            f"Samples({len(self)} {self.source} images of {self.num_classes} classes, {tuple(self.images.shape[1:])})"
        )

    def select(self, index: Tensor) -> Self:
        """The samples at ``index`` (int64 positions or a boolean mask)."""
        scores = None if self.scores is None else self.scores[index]
        return type(self)(self.images[index], self.labels[index], self.num_classes, self.source, scores)


def check_samples(samples: object, taker: str) -> None:
    """``samples`` must be `Samples`; ``taker`` names who takes them."""
    if not isinstance(samples, Samples):
        got = "None" if samples is None else type(samples).__name__
        raise InputError(
            f"{taker} takes Samples, not {got}. Make them with smi.invert(model, prior, ...); private data and "
            "triggers belong to the evaluator."
        )


def check_public(public: object, shape: Sequence[int] | None) -> None:
    """``public`` must be `PublicImages` of ``shape`` ``(C, H, W)`` (None: of any), or None."""
    if public is None:
        return
    if not isinstance(public, PublicImages):
        raise InputError(f"public is a {type(public).__name__}. Allowed: PublicImages, or None.")
    if shape is not None and tuple(public.images.shape[1:]) != tuple(shape):
        raise InputError(
            f"Public images are {tuple(public.images.shape[1:])}, but {tuple(shape)} is needed. "
            "Resize the public images."
        )


class PrivateData:
    """The private side of a domain: ``train`` (the attacker's) and ``test`` (the evaluator's).

    Both are None for unlabelled sources. `forget` drops both; afterwards, as where there never were any, any access
    raises `InputError`. The pipeline's tests call it before the defense runs.
    """

    def __init__(self, train: PrivateSet | None = None, test: PrivateSet | None = None) -> None:
        self._train = train
        self._test = test

    def __bool__(self) -> bool:
        """Whether there is private data."""
        return self._train is not None

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


class Domain:
    """One setting: private data for attacker and evaluator, public images for the defender, class names.

    Attributes:
        name: Its name.
        classes: Names, in the order of the labels; empty for an unlabelled source.
        private: For attacker and evaluator.
        public: None where nobody has said which images are public; reading it then raises `InputError`.

    Raises:
        InputError: Where private and public images differ in shape.
    """

    def __init__(
        self, name: str, classes: Sequence[str], private: PrivateData, public: PublicImages | None = None
    ) -> None:
        self.name, self.classes, self.private = name, tuple(classes), private
        self._public = public
        if private and public is not None:
            _check_same_shape(name, private.train.images, public.images)

    @property
    def num_classes(self) -> int:
        """Number of classes of the private task; 0 for an unlabelled source."""
        return len(self.classes)

    @property
    def has_public(self) -> bool:
        """Whether `public` can be read."""
        return self._public is not None

    @property
    def public(self) -> PublicImages:
        """What the defender may use."""
        if self._public is None:
            raise InputError(
                f"The domain {self.name!r} has no public images, and its private ones are not the defender's. Name "
                "a source: load_domain(..., public=NAME), where NAME is a domain, an .npz or an image folder."
            )
        return self._public

    def with_public(self, public: PublicImages) -> Domain:
        """The same domain with other public images, of the same shape."""
        return Domain(self.name, self.classes, self.private, public)

    def with_public_classes(self, labels: Sequence[int]) -> Domain:
        """The training images of the classes ``labels`` as public images; the task has the other classes alone.

        The classes that stay are numbered anew from 0, in their order.

        Raises:
            InputError: Unless ``labels`` are different classes of this domain that leave it two or more.
        """
        train, test = self.private.train, self.private.test
        gone = set(labels)
        kept = [label for label in range(self.num_classes) if label not in gone]
        if not gone or len(gone) < len(labels) or not gone <= set(range(self.num_classes)) or len(kept) < 2:
            raise InputError(
                f"The classes {list(labels)} cannot be the public ones of {self.name!r}. Allowed: different numbers "
                f"from 0 to {self.num_classes - 1}, at least one, that leave at least two private classes."
            )
        public = train.images[torch.isin(train.labels, torch.tensor(sorted(gone)))]
        private = PrivateData(_only(train, kept), _only(test, kept))
        return Domain(self.name, [self.classes[label] for label in kept], private, PublicImages(public))

    def __repr__(self) -> str:
        public = "no public images" if self._public is None else repr(self._public)
        return f"Domain({self.name!r}, {self.num_classes} classes, {self.private}, {public})"


def _check_same_shape(name: str, private: Tensor, public: Tensor) -> None:
    if private.shape[1] != public.shape[1]:
        raise InputError(
            f"The public images have {public.shape[1]} channels, the private ones of {name!r} "
            f"{private.shape[1]}. They must agree. "
            "Try images.mean(1, keepdim=True) for grey, or images.expand(-1, 3, -1, -1) for colour."
        )
    if private.shape[2:] != public.shape[2:]:
        raise InputError(
            f"The public images are {tuple(public.shape[2:])}, the private ones of {name!r} "
            f"{tuple(private.shape[2:])}. They must agree. "
            "Try torch.nn.functional.interpolate(images, size=..., mode='area')."
        )


def _only(part: PrivateSet, kept: Sequence[int]) -> PrivateSet:
    """The images of the classes ``kept``, which become 0, 1, and so on."""
    number = torch.full((part.num_classes,), -1)
    number[list(kept)] = torch.arange(len(kept))
    labels = number[part.labels]
    return PrivateSet(part.images[labels >= 0], labels[labels >= 0], len(kept))


def not_there(kind: str, path: Path) -> InputError:
    """The error for a missing "file" or "folder"."""
    if path.is_absolute():
        return InputError(f"There is no {kind} {path}. Check the path.")
    return InputError(
        f"There is no {kind} {path} in {Path.cwd()}, the current folder, where relative paths start. "
        "Run this from the folder they belong to, or give the whole path."
    )


def private_set(images: Tensor, labels: Tensor, classes: Sequence[str]) -> PrivateSet:
    """A `PrivateSet` from uint8 or float images ``[N, C, H, W]`` and integer labels ``[N]``."""
    return PrivateSet(as_float(images), labels.to(torch.int64), len(classes))


def as_float(images: Tensor) -> Tensor:
    """uint8 images become float32 in [0, 1]; float images are returned as float32."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images.float()
