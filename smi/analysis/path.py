"""The loss of samples along the actual path of a removal, and how far the removal moves the weights.

If a sample's loss stays below ln 2 wherever the path leads, its label stays the model's prediction (the other classes
share less than half of the probability), so that keeping the label never opposes the removal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.defenses.base import Defense
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError
from smi.runtime.checks import check_model, device_of, evaluating

LN2 = math.log(2)


@dataclass(frozen=True, eq=False)
class Path:
    """What happened round by round; round 0 is before the first.

    Attributes:
        loss: Cross-entropy of each probe to its label, float32 ``[rounds + 1, N]``.
        distance: ``‖θ'_l − θ_l‖ / ‖θ_l‖`` of each tensor l against the suspect model ``[rounds + 1, L]`` (inf where a
            tensor of zeros has moved).
        names: Of the tensors.
    """

    loss: Tensor
    distance: Tensor
    names: tuple[str, ...]

    @property
    def worst(self) -> Tensor:
        """The largest loss of each probe on the path ``[N]``."""
        return self.loss.amax(0)

    @property
    def kept(self) -> Tensor:
        """Probes whose loss stays below ln 2 all along, bool ``[N]``."""
        return self.worst < LN2

    @property
    def furthest(self) -> Tensor:
        """The largest relative distance of each tensor on the path ``[L]``."""
        return self.distance.amax(0)


def loss_along_path(
    model: nn.Module,
    defense: Defense,
    samples: Samples | None,
    public: PublicImages | None,
    probes: Samples,
    seed: int = 0,
) -> Path:
    """Run ``defense`` on ``model`` and follow the probes on the way; the removal itself is not changed by that.

    Of a defense that trains more than once, the last training is followed.

    Args:
        model: As for `Defense.repair`.
        defense: Whose rounds are followed.
        samples: As for `Defense.repair`.
        public: As for `Defense.repair`.
        probes: Labelled images, whether the removal uses them or not.
        seed: As for `Defense.repair`.

    Raises:
        InputError: For a defense that does not train in rounds (CLP, ANP, I-BAU, erasure).
    """
    check_model(model, probes.images, probes.num_classes)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    losses: list[Tensor] = []
    distances: list[Tensor] = []

    def look(repaired: nn.Module, index: int) -> None:
        if index == 0:
            losses.clear()
            distances.clear()
        losses.append(_losses(repaired, probes))
        distances.append(_distances(repaired, start))

    defense.repair(model, samples, public, seed=seed, on_round=look)
    if not losses:
        raise InputError(f"The defense {defense.name!r} does not train in rounds. Use ft, fp, nad or ftsam.")
    return Path(torch.stack(losses), torch.stack(distances), tuple(start))


@torch.no_grad()
def _losses(model: nn.Module, probes: Samples, batch_size: int = 512) -> Tensor:
    """Float32 throughout: losses of confident predictions are smaller than bfloat16's rounding."""
    device, found = device_of(model), []
    with evaluating(model):
        for images, labels in zip(probes.images.split(batch_size), probes.labels.split(batch_size), strict=True):
            found.append(F.cross_entropy(model(images.to(device)).float(), labels.to(device), reduction="none").cpu())
    return torch.cat(found)


@torch.no_grad()
def _distances(model: nn.Module, start: dict[str, Tensor]) -> Tensor:
    moved = torch.stack([(value - start[name]).norm() for name, value in model.named_parameters()])
    size = torch.stack([value.norm() for value in start.values()])
    return torch.where(moved == 0, moved, moved / size).cpu()
