"""FT-SAM (Zhu et al., "Enhancing Fine-Tuning Based Backdoor Defense with Sharpness-Aware Minimization", ICCV 2023).

    min_θ  max_{‖T⁻¹ε‖₂ ≤ ρ}  E CE(f_{θ+ε}(x), y),   T = diag(|θ|)

To first order the inner maximum is at ``ε = ρ T² ∇L / ‖T ∇L‖₂``: the neighbourhood is wide where weights are large, as
those of a backdoor's neurons are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.checks import check_number
from smi.compute import Runner
from smi.defenses.base import Defense, Distillation, Repair, Schedule, defenses, train_repair
from smi.domains.base import PublicImages, Samples
from smi.seeding import stream


@defenses.register("ftsam")
@dataclass(frozen=True, kw_only=True)
class FTSAM(Defense):
    """Fine-tuning at the worst point of a neighbourhood. rho: its size ρ, as a multiple of the weights' own; 0 is `ft`.

    With ``schedule.distill`` the repaired model, not the perturbed one, is held to the suspect's outputs.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(distill=0.0))
    rho: float = 0.5

    name = "ftsam"

    def __post_init__(self) -> None:
        check_number("rho", self.rho, low=0)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        distil = Distillation(model, public, stream(seed, "distil"))
        weights: dict[str, Tensor] = {}

        def before_round(trained: nn.Module, index: int) -> None:
            weights.update(trained.named_parameters())  # of the copy that the loop trains

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            def at(point: Mapping[str, Tensor]) -> Tensor:
                return F.cross_entropy(run(images, point), labels)

            value = at(worst(weights, at, self.rho))
            return value + self.schedule.distill * distil(run, images) if self.schedule.distill else value

        repaired, curve = train_repair(model, samples, self.schedule, loss, seed=seed, before_round=before_round)
        return Repair(repaired, self.name, samples.source, self.settings(), {"loss": curve})


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
