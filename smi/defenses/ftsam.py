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

from smi.defenses.base import Repair, defenses
from smi.defenses.sgd import Tuned, trainable
from smi.domains.base import PublicImages, Samples
from smi.runtime.checks import check_number
from smi.runtime.compute import Runner
from smi.runtime.job import Job


@defenses.register("ftsam")
@dataclass(frozen=True, kw_only=True)
class FTSAM(Tuned):
    """Fine-tuning at the worst point of a neighbourhood of the weights, with the paper's settings for CIFAR-10.

    SGD with label smoothing and a cosine decay; every BatchNorm normalises by the batch, and learns its statistics
    again in the first of a step's two passes. Public images are not used. Three details differ from the authors' code:
    images are shifted but not mirrored, because a mirrored digit or traffic sign is another one or none
    (``augment="crop_flip"`` is the paper's); one cosine goes over all steps, where theirs has a period of a hundred;
    and dropout stays off.

    Attributes:
        rho: ρ, the size of the neighbourhood as a multiple of the weights' own; 0 is fine-tuning by the same recipe.
        smoothing: Of the labels, in [0, 1].
    """

    rho: float = 2.0
    smoothing: float = 0.1

    name = "ftsam"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, low=0)
        check_number("smoothing", self.smoothing, low=0, high=1)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        repaired, norms = trainable(model)
        weights: dict[str, Tensor] = dict(repaired.named_parameters())

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            def at(point: Mapping[str, Tensor]) -> Tensor:
                return F.cross_entropy(run(images, point), labels, label_smoothing=self.smoothing)

            point = worst(weights, at, self.rho)
            with _forgetting(norms):  # what is normalised at the worst point is not remembered
                return at(point)

        curve = self._train(repaired, samples, loss, job)
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
