"""The inner level: perturbations of input and parameters under which a prediction is least stable.

Each returns constants for the outer step (Danskin's theorem): no gradient flows through the ascent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.runtime.compute import Runner

TINY = 1e-12


def slopes_at(run: Runner, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The mean cross-entropy, its gradient by the images ``[N, C, H, W]`` and by each parameter of ``model``.

    Both inner problems begin along these, and the outer one goes down the first: one pass serves all three.
    """
    images = images.detach().requires_grad_()
    weights = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    loss = F.cross_entropy(run(images, weights), labels)
    slope, *slopes = torch.autograd.grad(loss, [images, *weights.values()], materialize_grads=True)
    return loss.detach(), slope, slopes


def worst_input(
    run: Runner, images: Tensor, labels: Tensor, *, radius: float, steps: int, slope: Tensor | None = None
) -> Tensor:
    """δ ``[N, C, H, W]`` with ``‖δ_i‖₂ ≤ radius`` that raises ``CE(f(x_i + δ_i), y_i)``, one per image.

    Normalised-gradient ascent from zero; ``x + δ`` is kept in [0, 1].

    Args:
        run: The model f.
        images: x ``[N, C, H, W]``.
        labels: y ``[N]``.
        radius: Largest L2 norm, in [0, 1] pixels.
        steps: Of the ascent.
        slope: The gradient at zero, up to a factor, where it is known.
    """
    images = images.detach()
    delta = torch.zeros_like(images)
    for step in range(steps):
        if step == 0 and slope is not None:
            gradient = slope
        else:
            delta.requires_grad_()
            loss = F.cross_entropy(run((images + delta).clamp(0, 1)), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, delta)
        delta = delta.detach() + 1.5 * radius / steps * _unit(gradient)
        delta = delta * (radius / _norms(delta).clamp(min=TINY)).clamp(max=1)
        delta = (images + delta).clamp(0, 1) - images
    return delta


def worst_parameters(
    run: Runner,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    radius: float,
    slopes: Sequence[Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """Parameters ``θ + v`` with ``‖v_l‖ = radius · ‖θ_l‖`` for every tensor l that raise the mean cross-entropy.

    One normalised-gradient step, as in sharpness-aware minimisation (Foret et al., ICLR 2021), relative per tensor as
    in its adaptive form (Kwon et al., ICML 2021). One v for the whole batch.

    Args:
        run: The model, with its parameters as an argument.
        model: Whose parameters θ are.
        images: ``[N, C, H, W]`` in [0, 1].
        labels: What they are to be ``[N]``.
        radius: Relative to each tensor's norm.
        slopes: The gradients, where known.
    """
    if slopes is None:
        slopes = slopes_at(run, model, images, labels)[2]
    return {
        name: (w + radius * w.norm() / g.norm().clamp(min=TINY) * g).detach()
        for (name, w), g in zip(model.named_parameters(), slopes, strict=True)
    }


def _norms(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def _unit(x: Tensor) -> Tensor:
    return x / _norms(x).clamp(min=TINY)
