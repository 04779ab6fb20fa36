"""Where found triggers move the features, and the removal of these directions from a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.erasure.head import Head, erase, features, head_of
from smi.erasure.search import ANYWHERE, REACHED, Found
from smi.errors import InputError
from smi.runtime.checks import device_of
from smi.runtime.compute import frozen, predict


def erase_found(model: nn.Module, samples: Samples, natural: Tensor, found: Sequence[Found]) -> None:
    """Take the `directions` of these triggers out of the model's head, in place.

    Args:
        model: The model.
        samples: Labelled images, whose shifts are looked at.
        natural: Images ``[N, C, H, W]`` whose features say what is natural (`smi.erasure.natural`).
        found: Triggers.
    """
    head = head_of(model, samples.images[:2])
    rows = directions(model, head, samples, found)
    if len(rows):
        erase(head.layer, features(model, head, natural), rows)


def kept_without(model: nn.Module, samples: Samples, natural: Tensor, found: Sequence[Found]) -> Tensor | None:
    """The share of the samples, in [0, 1], that have their label where `erase_found` is done to a copy of the model.

    None for a model that has no `Head`.
    """
    erased = frozen(model)
    try:
        erase_found(erased, samples, natural, found)
    except InputError:
        return None
    return (predict(erased, samples.images).argmax(1) == samples.labels).float().mean()


def held_without(model: nn.Module, samples: Samples, natural: Tensor, found: Found) -> Tensor:
    """How much of its reach each trigger keeps where `erase_found` is done to a copy of the model with it alone.

    Little where it works by that direction. Much where stamped images have nothing else left: without the direction
    they are all alike, and go where the model sends what it does not know.

    Args:
        model: The model.
        samples: Labelled images, whose shifts are looked at and which are stamped.
        natural: Images ``[N, C, H, W]`` whose features say what is natural.
        found: Triggers of one family.

    Returns:
        Shares ``[K]``, 0 or more; 0 where no image is of another class.
    """
    shares = []
    for index, target in enumerate(found.targets.tolist()):
        one, erased, others = found.select(torch.tensor([index])), frozen(model), samples.labels != target
        if not others.any():  # nothing to be sent there
            shares.append(0.0)
            continue
        erase_found(erased, samples, natural, [one])
        stamped, labels = _stamped(one, samples.images[others], device_of(model)), samples.labels[others]
        said = (predict(each, stamped).argmax(1) for each in (model, erased))
        before, after = ((s != labels if target == ANYWHERE else s == target).float().mean().item() for s in said)
        shares.append(after / max(before, 1e-3))
    return torch.tensor(shares)


def directions(model: nn.Module, head: Head, samples: Samples, found: Sequence[Found]) -> Tensor:
    """The mean shift of the head's input under each trigger, ``[r, F]``; r may be 0.

    Triggers that reach less than `REACHED` are left out. One that sends images `ANYWHERE` sends every class elsewhere,
    so it has a shift for each class of which it moves that many.

    Args:
        model: The model, whose features they are.
        head: Its head.
        samples: Labelled images.
        found: Triggers.
    """
    natural = features(model, head, samples.images)
    rows = [natural[:0]]
    for one in found:
        for index in (one.reach > REACHED).nonzero()[:, 0].tolist():
            target = int(one.targets[index])
            chosen = samples.labels != target
            single = one.select(torch.tensor([index]))
            stamped = _stamped(single, samples.images[chosen], device_of(model))
            shift = features(model, head, stamped) - natural[chosen]
            rows.append(_by_class(model, stamped, shift, samples.labels) if target == ANYWHERE else shift.mean(0)[None])
    return torch.cat(rows)


@torch.no_grad()
def _stamped(one: Found, images: Tensor, device: torch.device) -> Tensor:
    return torch.cat([one.stamp(part.to(device))[0].cpu() for part in images.split(256)])


def _by_class(model: nn.Module, stamped: Tensor, shift: Tensor, labels: Tensor) -> Tensor:
    """The mean shift of each class of which enough images are moved."""
    moved = predict(model, stamped).argmax(1) != labels
    rows = [shift[:0]]
    for label in labels.unique():
        mine = labels == label
        if moved[mine].float().mean() > REACHED:
            rows.append(shift[mine & moved].mean(0)[None])
    return torch.cat(rows)
