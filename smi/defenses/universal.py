"""Universal perturbations: one δ for all images. What I-BAU unlearns, and how a defender sees a backdoor.

A class that one small δ reaches from every image is suspicious. The search starts from noise of norm ``radius``, not
from zero: on images with a dark border the network's units there are dead, no gradient points at a corner patch, and
ascent from zero never finds it (seen: fooling 65 % from zero, 100 % from noise, on the same backdoored model).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.runtime.compute import Runner
from smi.runtime.memory import Chunk, halving

TINY = 1e-12


def universal(
    run: Runner,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    radius: float,
    steps: int,
    rng: torch.Generator,
) -> Tensor:
    """One universal δ per entry of ``targets``: ``[T, C, H, W]`` with ``‖δ_t‖₂ ≤ radius``.

    Normalised-gradient steps on the cross-entropy, shorter and shorter, so that the last ones refine.

    Args:
        run: The model.
        images: ``[N, C, H, W]`` in [0, 1].
        labels: What they are ``[N]``.
        targets: Classes ``[T]``, to each of which every image is to be sent (those of the class itself are left out).
        radius: Largest L2 norm of each δ, in [0, 1] pixels.
        steps: How many.
        rng: Draws the noise from which they start.
    """
    shape = images.shape[1:]
    delta = torch.randn(len(targets), *shape, generator=rng).to(images.device) * radius / math.sqrt(shape.numel())
    targets = targets.to(labels.device)
    weight = targets[:, None] != labels[None]

    def ascent(some: Tensor) -> Tensor:
        """What some of the images contribute to the gradients."""
        delta.requires_grad_()
        shown = (images[some][None] + delta[:, None]).clamp(0, 1).flatten(0, 1)
        losses = F.cross_entropy(run(shown), targets.repeat_interleave(len(some)), reduction="none")
        return torch.autograd.grad((weight[:, some] * losses.view(len(targets), -1)).sum(), delta)[0]

    chunk = Chunk(len(images))
    for step in range(steps):
        gradient = sum(halving(ascent, torch.arange(len(images)), chunk), torch.zeros(()))
        length = 3 * radius * (steps - step) / (steps * (steps + 1))
        unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
        delta = into_ball(delta.detach() - length * unit, radius)
    return delta.detach()


def into_ball(delta: Tensor, radius: float) -> Tensor:
    """Each ``delta[t]`` scaled down to norm ``radius`` where it is longer."""
    norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
    return delta * (radius / norm).clamp(max=1)


@torch.no_grad()
def fooling_rate(run: Runner, images: Tensor, labels: Tensor, targets: Tensor, delta: Tensor) -> Tensor:
    """Share ``[T]``, on the CPU, of the images that δ_t sends to class t, of those that are not of class t."""
    rates, chunk = [], Chunk(len(images))
    for target, one in zip(targets.tolist(), delta, strict=True):
        shown = (images[labels != target] + one).clamp(0, 1)
        predicted = torch.cat(
            [shown.new_zeros(0, dtype=torch.int64), *halving(lambda x: run(x).argmax(1), shown, chunk)]
        )
        rates.append((predicted == target).float().mean().cpu() if len(predicted) else torch.tensor(0.0))
    return torch.stack(rates)
