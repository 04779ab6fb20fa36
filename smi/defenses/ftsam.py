"""FT-SAM (Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023).

    min_θ  max_{‖T⁻¹ε‖₂ ≤ ρ}  E CE(f_{θ+ε}(x), y),   T = diag(|θ|)

To first order the inner maximum is at ``ε = ρ T² ∇L / ‖T ∇L‖₂``: the neighbourhood is wide where weights are large, as
those of a backdoor's neurons are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.checks import check_number
from smi.classifiers import AUGMENTATIONS
from smi.compute import Runner
from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.sgd import train, trainable
from smi.domains.base import PublicImages, Samples
from smi.errors import InputError


@defenses.register("ftsam")
@dataclass(frozen=True, kw_only=True)
class FTSAM(Defense):
    """Fine-tuning at the worst point of a neighbourhood of the weights, with the paper's settings for CIFAR-10.

    SGD with label smoothing and a cosine decay; every BatchNorm normalises by the batch, and learns its statistics
    again in the first of a step's two passes. Public images are not used. Three details differ from the authors' code:
    images are shifted but not mirrored, because a mirrored digit or traffic sign is another one or none
    (``augment="crop_flip"`` is the paper's); one cosine goes over all steps, where theirs has a period of a hundred;
    and dropout stays off.

    Attributes:
        rho: ρ, the size of the neighbourhood as a multiple of the weights' own; 0 is fine-tuning by the same recipe.
        epochs: Passes over the samples. 500 samples make 200 steps.
        lr: Rate at the first step.
        momentum: In [0, 1].
        weight_decay: Of all weights.
        batch_size: Samples a step, at most: they are cut into equal batches.
        smoothing: Of the labels, in [0, 1].
        augment: Of the samples, a name of `smi.classifiers.AUGMENTATIONS`.
    """

    rho: float = 2.0
    epochs: int = 100
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 5e-4
    batch_size: int = 256
    smoothing: float = 0.1
    augment: str = "crop"

    name = "ftsam"

    def __post_init__(self) -> None:
        for rate in ("rho", "lr", "weight_decay"):
            check_number(rate, getattr(self, rate), low=0)
        for share in ("momentum", "smoothing"):
            check_number(share, getattr(self, share), low=0, high=1)
        check_number("epochs", self.epochs, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=2, integer=True)
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augment is {self.augment!r}. Allowed: {', '.join(AUGMENTATIONS)}.")

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        repaired, norms = trainable(model)
        weights: dict[str, Tensor] = dict(repaired.named_parameters())
        optimizer = torch.optim.SGD(weights.values(), self.lr, self.momentum, weight_decay=self.weight_decay)

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            def at(point: Mapping[str, Tensor]) -> Tensor:
                return F.cross_entropy(run(images, point), labels, label_smoothing=self.smoothing)

            point = worst(weights, at, self.rho)
            with _forgetting(norms):  # what is normalised at the worst point is not remembered
                return at(point)

        curve = train(
            repaired, samples, optimizer, loss,
            epochs=self.epochs, batch_size=self.batch_size, augment=self.augment, seed=seed,
        )  # fmt: skip
        return Repair(repaired.eval(), self.name, samples.source, self.settings(), {"loss": curve})


@contextmanager
def _forgetting(norms: Sequence[nn.Module]) -> Iterator[None]:
    """BatchNorm layers that normalise by the batch and do not learn its statistics."""
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def worst(
    weights: Mapping[str, Tensor], loss: Callable[[Mapping[str, Tensor]], Tensor], rho: float
) -> dict[str, Tensor]:
    """``weights + ε`` by name. ε is a constant, so that a loss there has SAM's gradient with respect to ``weights``."""
    gradients = torch.autograd.grad(loss(weights), list(weights.values()), allow_unused=True)
    with torch.no_grad():
        found = {n: (w, g) for (n, w), g in zip(weights.items(), gradients, strict=True) if g is not None}
        norm = torch.stack([(w * g).square().sum() for w, g in found.values()]).sum().sqrt().clamp(min=1e-12)
        shift = {n: rho * w.square() * g / norm for n, (w, g) in found.items()}
    return {n: w + shift[n] if n in shift else w for n, w in weights.items()}
