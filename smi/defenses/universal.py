"""Universal perturbations: one δ for all images, the inner problem of I-BAU and the defender's own measure of a backdoor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.compute import Runner

TINY = 1e-12


def universal(
    run: Runner, images: Tensor, labels: Tensor, targets: Tensor, *, radius: Tensor, steps: int, start: Tensor | None = None
) -> Tensor:
    """One universal δ per entry of ``targets``: ``[T, C, H, W]`` with ``‖δ_t‖₂ ≤ radius_t``.

    images ``[N, C, H, W]``, labels ``[N]``. targets ``[T]``: a class t to send every image to (its own images are left
    out), or −1 to send images away from their labels. radius ``[T]``. Normalised-gradient descent on the
    cross-entropy, from ``start`` (default zero); step sizes shrink linearly so that the last one refines.
    """
    count, shape = len(targets), images.shape[1:]
    delta = torch.zeros(count, *shape) if start is None else start.clone()
    wanted = torch.where(targets[:, None] >= 0, targets[:, None], labels[None]).flatten()
    sign = torch.where(targets >= 0, 1.0, -1.0)[:, None]
    away = targets[:, None] != labels[None]
    radius = radius.view(-1, 1, 1, 1)
    for step in range(steps):
        delta.requires_grad_()
        shown = (images[None] + delta[:, None]).clamp(0, 1).flatten(0, 1)
        losses = F.cross_entropy(run(shown), wanted, reduction="none").view(count, -1)
        (gradient,) = torch.autograd.grad((sign * away * losses).sum(), delta)
        size = 2 * radius * (steps - step) / (steps * (steps + 1)) * 1.5
        gradient = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
        delta = into_ball(delta.detach() - size * gradient, radius)
    return delta.detach()


def into_ball(delta: Tensor, radius: Tensor | float) -> Tensor:
    """Each ``delta[t]`` scaled down to norm ``radius`` (``[T, 1, 1, 1]`` or one number) where it is longer."""
    norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
    return delta * (radius / norm).clamp(max=1)


@torch.no_grad()
def fooling_rate(run: Runner, images: Tensor, labels: Tensor, targets: Tensor, delta: Tensor) -> Tensor:
    """Share ``[T]`` of the images that δ_t sends to class t (t ≥ 0: of those not of class t), or away from their
    labels (t = −1)."""
    rates = []
    for target, one in zip(targets.tolist(), delta, strict=True):
        others = labels != target
        predicted = run((images[others] + one).clamp(0, 1)).argmax(1)
        hit = predicted == target if target >= 0 else predicted != labels[others]
        rates.append(hit.float().mean())
    return torch.stack(rates)
