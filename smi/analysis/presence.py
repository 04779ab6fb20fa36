"""Is the trigger in a set of images? A detector that the evaluator trains, and, for patches, a direct measurement."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from smi.attacks.base import Attack
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import TrainConfig, train_classifier
from smi.runtime.compute import predict

CLEAN, STAMPED = 0, 1


@dataclass(frozen=True, eq=False)
class Detector:
    """Tells stamped images from clean ones.

    A share on other images must be read against those on held-out ones.

    Attributes:
        model: Images to logits ``[N, 2]``, stamped last.
        hits: Share of held-out stamped images that it takes for stamped.
        false_alarms: Share of held-out clean images that it takes for stamped.
    """

    model: nn.Module
    hits: float
    false_alarms: float


def train_detector(
    train: PrivateSet, test: PrivateSet, attack: Attack, config: TrainConfig | None = None, *, seed: int = 0
) -> Detector:
    """A detector of ``attack``'s trigger, trained on every image of ``train`` twice: as it is, and stamped.

    Args:
        train: Clean images.
        test: Held-out images for the detector's own rates.
        attack: Ready to stamp.
        config: As for a classifier.
        seed: Of the training.
    """
    images = torch.cat([train.images, attack.stamp(train.images)])
    labels = torch.tensor([CLEAN, STAMPED]).repeat_interleave(len(train))
    model = train_classifier(PrivateSet(images, labels, 2), config or TrainConfig(), seed=seed)
    return Detector(model, _share(model, attack.stamp(test.images)), _share(model, test.images))


def trigger_presence(detector: Detector, images: Tensor) -> float:
    """The share, in [0, 1], of the images ``[N, C, H, W]`` that the detector takes for stamped.

    The detector knows private images only. On others, what it says of the same images once they are stamped tells
    whether it would see a trigger there.
    """
    return _share(detector.model, images)


def patch_residual(images: Tensor, attack: Attack, clean: Tensor) -> Tensor:
    """How far each image is from carrying a trigger that replaces pixels: ``‖stamp(x) − x‖`` over its mean on clean.

    Args:
        images: ``[N, C, H, W]``.
        attack: Whose trigger it is.
        clean: Real images without the trigger ``[M, C, H, W]``.

    Returns:
        One number an image ``[N]``, 0 where the trigger is there to the pixel, about 1 where there is no more of it
        than in clean images.

    Raises:
        InputError: For a trigger that changes an image each time it is stamped: the change then says nothing about what
            was there before.
    """
    once = attack.stamp(clean)
    if not torch.allclose(attack.stamp(once), once, atol=1e-6):
        raise InputError(
            f"{type(attack).__name__} does not replace pixels: stamping twice is not stamping once. "
            "Allowed: patches such as BadNets. Use train_detector and trigger_presence."
        )
    usual = _change(clean, once).mean()
    if usual == 0:
        raise InputError("The trigger leaves the clean images as they are. Pass clean images that do not carry it.")
    return _change(images, attack.stamp(images)) / usual


def _change(before: Tensor, after: Tensor) -> Tensor:
    return (after - before).flatten(1).norm(dim=1)


def _share(model: nn.Module, images: Tensor) -> float:
    return (predict(model, images).argmax(1) == STAMPED).double().mean().item()
