"""Samples for tests of removals: noise, and a task that anyone can see through, with a backdoor in its corner."""

from __future__ import annotations

import torch
from torch import nn

from smi.defenses import Schedule
from smi.domains import Samples

QUICK = Schedule(rounds=2, batch_size=12, distill=1.0)


def samples(n: int = 24, classes: int = 3, size: int = 8, seed: int = 0) -> Samples:
    rng = torch.Generator().manual_seed(seed)
    return Samples(torch.rand(n, 1, size, size, generator=rng), torch.arange(n) % classes, classes, "smi")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class PatchBackdoor(nn.Module):
    """Brightness of the left, middle and right third decides the class, but a bright lower right corner means 0.

    The corner unit is dead on black corners, as in a trained network, so that no gradient points there.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thirds = torch.stack([x[..., 0:3].mean((1, 2, 3)), x[..., 3:6].mean((1, 2, 3)), x[..., 6:9].mean((1, 2, 3))], 1)
        corner = torch.relu(x[:, :, 7:, 7:].mean((1, 2, 3)) - 0.02)
        return 20 * thirds + torch.stack([60 * corner, 0 * corner, 0 * corner], 1)


def thirds(n: int) -> Samples:
    images = torch.zeros(n, 1, 9, 9)
    labels = torch.arange(n) % 3
    for i, label in enumerate(labels.tolist()):
        images[i, :, 1:6, 3 * label : 3 * label + 3] = 0.8
    return Samples(images, labels, 3, "smi")


def linear_thirds() -> nn.Module:
    """Which third is bright, by a weight matrix: a suspect with weights."""
    weights = nn.Sequential(nn.Flatten(), nn.Linear(81, 3))
    with torch.no_grad():
        for k in range(3):
            weights[1].weight[k] = 0
            weights[1].weight[k].view(9, 9)[:, 3 * k : 3 * k + 3] = 1.0
        weights[1].bias.zero_()
    return weights
