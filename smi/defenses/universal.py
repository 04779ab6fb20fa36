"""Universal perturbations: one δ for all images. The inner problem of I-BAU, and how a defender sees a backdoor.

A class that one small δ reaches from every image is suspicious. The search starts from noise of norm ``radius``, not
from zero: on images with a dark border the network's units there are dead, no gradient points at a corner patch, and
ascent from zero never finds it (seen: fooling 65 % from zero, 100 % from noise, on the same backdoored model).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.compute import Runner
from smi.memory import Chunk, halving

TINY = 1e-12
AWAY = -1  # as a target: away from the image's own label


def noise_start(
    count: int, shape: torch.Size, radius: float | Tensor, rng: torch.Generator, device: torch.device | str = "cpu"
) -> Tensor:
    """Gaussian noise ``[count, *shape]`` of norm close to ``radius``."""
    return torch.randn(count, *shape, generator=rng).to(device) * radius / math.sqrt(shape.numel())


def universal(
    run: Runner,
    images: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    radius: float | Tensor,
    steps: int,
    rng: torch.Generator,
) -> Tensor:
    """One universal δ per entry of ``targets``: ``[T, C, H, W]`` with ``‖δ_t‖₂ ≤ radius``, one for all or
    ``[T, 1, 1, 1]``.

    images ``[N, C, H, W]``, labels ``[N]``. targets ``[T]``: a class t to send every image to (images of t itself are
    left out), or `AWAY` to send images away from their labels. Normalised-gradient steps on the cross-entropy, shorter
    and shorter, so that the last ones refine.
    """
    count = len(targets)
    delta, targets = noise_start(count, images.shape[1:], radius, rng, images.device), targets.to(labels.device)
    wanted = torch.where(targets[:, None] == AWAY, labels[None], targets[:, None])
    weight = torch.where(targets == AWAY, -1.0, 1.0)[:, None] * (targets[:, None] != labels[None])

    def ascent(some: Tensor) -> Tensor:
        """What some of the images contribute to the gradients."""
        delta.requires_grad_()
        shown = (images[some][None] + delta[:, None]).clamp(0, 1).flatten(0, 1)
        losses = F.cross_entropy(run(shown), wanted[:, some].flatten(), reduction="none").view(count, -1)
        return torch.autograd.grad((weight[:, some] * losses).sum(), delta)[0]

    chunk = Chunk(len(images))
    for step in range(steps):
        gradient = sum(halving(ascent, torch.arange(len(images)), chunk), torch.zeros(()))
        length = 3 * radius * (steps - step) / (steps * (steps + 1))
        unit = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
        delta = into_ball(delta.detach() - length * unit, radius)
    return delta.detach()


def into_ball(delta: Tensor, radius: float | Tensor) -> Tensor:
    """Each ``delta[t]`` scaled down to norm ``radius`` where it is longer."""
    norm = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1).clamp(min=TINY)
    return delta * (radius / norm).clamp(max=1)


def concentrate(delta: Tensor, share: Tensor) -> Tensor:
    """Each ``delta[n]`` on its strongest pixels alone: a share ``share[n]`` (0 to 1) of them, at the same norm.

    A patch found by an L2 search carries noise all over; unlearning only the mixture leaves some of the bare patch.
    Values stay within one pixel range, [−1, 1]. delta ``[N, C, H, W]``, share ``[N]``.
    """
    energy = delta.square().sum(1).flatten(1)
    kept = (share * energy.shape[1]).long().clamp(min=1)
    least = energy.sort(1, descending=True).values.gather(1, kept[:, None] - 1)
    sparse = delta * (energy >= least).view(len(delta), 1, *delta.shape[2:])
    scale = delta.flatten(1).norm(dim=1) / sparse.flatten(1).norm(dim=1).clamp(min=TINY)
    return (sparse * scale.view(-1, 1, 1, 1)).clamp(-1, 1)


@torch.no_grad()
def fooling_rate(run: Runner, images: Tensor, labels: Tensor, targets: Tensor, delta: Tensor) -> Tensor:
    """Share ``[T]``, on the CPU, of the images that δ_t sends to class t (of those not of class t), or away from their
    labels."""
    rates, chunk = [], Chunk(len(images))
    for target, one in zip(targets.tolist(), delta, strict=True):
        others = labels != target
        shown = (images[others] + one).clamp(0, 1)
        predicted = torch.cat(
            [shown.new_zeros(0, dtype=torch.int64), *halving(lambda x: run(x).argmax(1), shown, chunk)]
        )
        hit = predicted != labels[others] if target == AWAY else predicted == target
        rates.append(hit.float().mean().cpu() if len(hit) else torch.tensor(0.0))
    return torch.stack(rates)


def data_scale(images: Tensor) -> float:
    """Root mean square L2 distance of the images to their mean: the unit in which radii are searched."""
    return (images - images.mean(0)).flatten(1).square().sum(1).mean().sqrt().item()


def natural_radius(
    run: Runner, images: Tensor, labels: Tensor, num_classes: int, *, goal: float, steps: int, rng: torch.Generator
) -> tuple[float, int]:
    """The radius at which a universal δ reaches the *median* class from a share ``goal`` of the other classes' images,
    and the ascent steps that it took.

    A backdoor makes a few classes easy to reach; the median class is as hard to reach as the data make it, on digits
    as on photographs. So this is a radius for the inner problem in the data's own scale, found from the suspect model
    and samples alone. Bisection over 1.15-fold steps from 2 % to 120 % of `data_scale`. Where not even the largest
    reaches it, ``steps`` are too few for this model, and it is searched with three times as many, then nine (seen on
    43 traffic signs in colour: at one radius 5 % with 5 steps, 57 % with 15, 75 % with 40).
    """
    scale = data_scale(images)
    grid = [0.02 * scale]
    while grid[-1] < 1.2 * scale:
        grid.append(1.15 * grid[-1])
    targets = torch.arange(num_classes)
    if num_classes > 20:
        targets = torch.randperm(num_classes, generator=rng)[:20]
    for tried in (steps, 3 * steps, 9 * steps):
        low, high = 0, len(grid) - 1
        while low < high:
            middle = (low + high) // 2
            delta = universal(run, images, labels, targets, radius=grid[middle], steps=tried, rng=rng)
            reached = fooling_rate(run, images, labels, targets, delta).median() >= goal
            low, high = (low, middle) if reached else (middle + 1, high)
        if low < len(grid) - 1:
            break
    return grid[low], tried
