"""The inner level: perturbations of input and parameters under which a prediction is least stable.

Each returns constants for the outer step (Danskin's theorem): no gradient flows through the ascent.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.compute import Runner

TINY = 1e-12


def worst_input(run: Runner, images: Tensor, labels: Tensor, *, radius: float, steps: int) -> Tensor:
    """δ ``[N, C, H, W]`` with ``‖δ_i‖₂ ≤ radius`` that raises ``CE(f(x_i + δ_i), y_i)``, one per image.

    Normalised-gradient ascent from zero; ``x + δ`` is kept in [0, 1].
    """
    images = images.detach()
    delta = torch.zeros_like(images)
    for _ in range(steps):
        delta.requires_grad_()
        loss = F.cross_entropy(run((images + delta).clamp(0, 1)), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + 1.5 * radius / steps * _unit(gradient)
        delta = delta * (radius / _norms(delta).clamp(min=TINY)).clamp(max=1)
        delta = (images + delta).clamp(0, 1) - images
    return delta


def worst_parameters(
    run: Runner, model: nn.Module, images: Tensor, labels: Tensor, *, radius: float
) -> Mapping[str, Tensor]:
    """Parameters ``θ + v`` with ``‖v_l‖ = radius · ‖θ_l‖`` for every tensor l that raise the mean cross-entropy.

    One normalised-gradient step, as in sharpness-aware minimisation (Foret et al., ICLR 2021), relative per tensor as
    in its adaptive form (Kwon et al., ICML 2021). One v for the whole batch.
    """
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    loss = F.cross_entropy(run(images.detach(), weights), labels)
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    return {
        name: (w + radius * w.norm() / g.norm().clamp(min=TINY) * g).detach()
        for (name, w), g in zip(weights.items(), gradients, strict=True)
    }


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _unit(x: Tensor) -> Tensor:
    return x / _norms(x).clamp(min=TINY)
