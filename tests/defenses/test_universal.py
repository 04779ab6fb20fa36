"""Universal perturbations: how they are searched, and how much they fool."""

from __future__ import annotations

import pytest
import torch
from thirds import PatchBackdoor, rng, samples, thirds
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from smi.defenses.universal import fooling_rate, into_ball, universal
from smi.domains import Samples
from smi.runtime.compute import fast, frozen


def test_universal_delta_respects_the_ball_and_fools_more_than_its_start() -> None:
    model, s, targets = tiny_model(), samples(60), torch.tensor([0, 1, 2])
    with fast(frozen(model)) as run:
        start = universal(run, s.images, s.labels, targets, radius=1.5, steps=0, rng=rng())
        found = universal(run, s.images, s.labels, targets, radius=1.5, steps=10, rng=rng())
        assert found.shape == (3, 1, 8, 8)
        assert found.flatten(1).norm(dim=1).max() <= 1.5 * (1 + 1e-5)
        for target, before, after in zip(targets.tolist(), start, found, strict=True):
            loss = [targeted_loss(run, s, target, d) for d in (before, after)]
            assert loss[1] < loss[0]


def targeted_loss(run, s: Samples, target: int, delta: torch.Tensor) -> float:
    others = s.labels != target
    logits = run((s.images[others] + delta).clamp(0, 1))
    return F.cross_entropy(logits, torch.full((int(others.sum()),), target)).item()


def test_fooling_rate_counts_only_other_classes() -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[9.0, 0.0, 0.0]]).expand(len(images), 3)

    s = samples(9)
    with fast(Always()) as run:
        rates = fooling_rate(run, s.images, s.labels, torch.tensor([0, 1]), torch.zeros(2, 1, 8, 8))
    assert rates.tolist() == pytest.approx([1.0, 0.0])


def test_the_search_from_noise_finds_a_patch_that_ascent_from_zero_cannot() -> None:
    s, target = thirds(30), torch.tensor([0])
    with fast(PatchBackdoor()) as run:
        delta = universal(run, s.images, s.labels, target, radius=1.2, steps=10, rng=rng(1))
        corner = delta[0, 0, 7:, 7:].norm() / delta.norm()
        at_zero = torch.zeros(1, 1, 9, 9, requires_grad=True)
        loss = F.cross_entropy(run((s.images + at_zero).clamp(0, 1)), torch.zeros(30, dtype=torch.int64))
        (gradient,) = torch.autograd.grad(loss, at_zero)
    assert gradient[0, 0, 7:, 7:].abs().max() == 0, "the corner must be dead at zero, or this test shows nothing"
    assert corner > 0.3


def test_ball() -> None:
    delta = torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 0.1)])
    assert into_ball(delta, 1.0).flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 0.2])
