"""Universal perturbations: the inner problem of I-BAU, its radius, and what is made of its answers."""

from __future__ import annotations

import pytest
import torch
from thirds import PatchBackdoor, rng, samples, thirds
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from smi.compute import fast, frozen
from smi.defenses.universal import AWAY, concentrate, data_scale, fooling_rate, into_ball, natural_radius, universal
from smi.domains import Samples


def test_universal_delta_respects_the_ball_and_fools_more_than_its_start() -> None:
    model, s, targets = tiny_model(), samples(60), torch.tensor([AWAY, 0, 1, 2])
    with fast(frozen(model)) as run:
        start = universal(run, s.images, s.labels, targets, radius=1.5, steps=0, rng=rng())
        found = universal(run, s.images, s.labels, targets, radius=1.5, steps=10, rng=rng())
        assert found.shape == (4, 1, 8, 8)
        assert found.flatten(1).norm(dim=1).max() <= 1.5 * (1 + 1e-5)
        for target, before, after in zip(targets.tolist(), start, found, strict=True):
            loss = [targeted_loss(run, s, target, d) for d in (before, after)]
            assert loss[1] < loss[0]


def targeted_loss(run, s: Samples, target: int, delta: torch.Tensor) -> float:
    others = s.labels != target
    logits = run((s.images[others] + delta).clamp(0, 1))
    if target == AWAY:
        return -F.cross_entropy(logits, s.labels[others]).item()
    return F.cross_entropy(logits, torch.full((int(others.sum()),), target)).item()


def test_fooling_rate_counts_only_other_classes() -> None:
    class Always(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[9.0, 0.0, 0.0]]).expand(len(images), 3)

    s = samples(9)
    with fast(Always()) as run:
        rates = fooling_rate(run, s.images, s.labels, torch.tensor([AWAY, 0, 1]), torch.zeros(3, 1, 8, 8))
    assert rates.tolist() == pytest.approx([6 / 9, 1.0, 0.0])


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


def test_natural_radius_scales_with_the_data_and_is_not_moved_by_one_backdoored_class() -> None:
    s = thirds(60)

    class Thirds(PatchBackdoor):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x * self.mask)

        mask = torch.ones(9, 9)
        mask[7:, 7:] = 0

    radius = {}
    for name, model in (("clean", Thirds()), ("backdoored", PatchBackdoor())):
        with fast(model) as run:
            radius[name], _ = natural_radius(run, s.images, s.labels, 3, goal=0.5, steps=8, rng=rng(2))
    assert 0.02 * data_scale(s.images) < radius["clean"] <= 1.2 * 1.15 * data_scale(s.images)
    assert radius["backdoored"] == pytest.approx(radius["clean"], rel=0.35)


def test_concentrate_keeps_norm_and_strongest_pixels() -> None:
    delta = 0.1 * torch.randn(4, 3, 8, 8, generator=rng())
    share = torch.tensor([1.0, 0.5, 0.1, 1e-6])
    sparse = concentrate(delta, share)
    assert torch.allclose(sparse[0], delta[0], atol=1e-6)
    assert (sparse.abs().sum(1) > 0).flatten(1).sum(1).tolist() == [64, 32, 6, 1]
    norms = sparse.flatten(1).norm(dim=1) / delta.flatten(1).norm(dim=1)
    assert norms[:3].tolist() == pytest.approx([1, 1, 1], rel=1e-4)
    energy = delta[2].square().sum(0)
    assert energy[sparse[2].abs().sum(0) > 0].min() > energy[sparse[2].abs().sum(0) == 0].max()
    assert concentrate(100 * delta, share).abs().max() <= 1


def test_data_scale_and_ball() -> None:
    images = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert data_scale(images) == pytest.approx(1.0)  # each is 0.5 · √4 from the mean
    delta = torch.stack([torch.full((1, 2, 2), 2.0), torch.full((1, 2, 2), 0.1)])
    assert into_ball(delta, 1.0).flatten(1).norm(dim=1).tolist() == pytest.approx([1.0, 0.2])
