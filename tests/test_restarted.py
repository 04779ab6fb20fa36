"""The restarted solver: what it forgets, and what it learns again."""

from __future__ import annotations

import pytest
import torch
from thirds import rng, samples, thirds
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from smi.augment import vary
from smi.compute import fast
from smi.defenses import IBAU, Restarted, Schedule, defenses
from smi.defenses.channels import watch
from smi.defenses.restart import TrustedLabels, forget
from smi.domains import PublicImages
from smi.errors import InputError


def test_forgetting_keeps_the_size_of_weights_and_the_scale_of_features() -> None:
    model, images = tiny_model(), samples().images
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    same, fresh = (forget(model, noise, images, rng(3)) for noise in (0.0, 0.8))
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    for name, old in model.named_parameters():
        new = fresh.get_parameter(name)
        assert torch.equal(same.get_parameter(name), old)
        if old.ndim < 2:
            assert torch.equal(new, old)
        elif old.numel() > 100:
            assert new.std().item() == pytest.approx(old.std().item(), rel=0.15)
            alike = torch.corrcoef(torch.stack([new.flatten(), old.flatten()]))[0, 1].item()
            assert alike == pytest.approx(0.6, abs=0.15)  # √(1 − 0.8²)
    first = next(name for name, m in fresh.named_modules() if isinstance(m, nn.BatchNorm2d))
    seen: dict[str, torch.Tensor] = {}
    with watch(fresh, [first], seen):
        fresh(images)
    out, norm = seen[first].detach(), fresh.get_submodule(first)
    torch.testing.assert_close(out.mean((0, 2, 3)), norm.bias.detach(), rtol=0, atol=0.05)  # normalised before scaling
    assert not fresh.training
    assert norm.momentum == model.get_submodule(first).momentum


def linear_thirds() -> nn.Module:
    """Which third is bright, by a weight matrix: something to forget."""
    weights = nn.Sequential(nn.Flatten(), nn.Linear(81, 3))
    with torch.no_grad():
        for k in range(3):
            weights[1].weight[k] = 0
            weights[1].weight[k].view(9, 9)[:, 3 * k : 3 * k + 3] = 1.0
        weights[1].bias.zero_()
    return weights


def test_a_restarted_model_learns_again_what_it_forgot_but_not_without_training() -> None:
    """The defining terms of the restart: chance in the weights, and the suspect's labels."""
    s, weights = thirds(60), linear_thirds()
    schedule = Schedule(rounds=40, batch_size=30, lr=0.05, distill=1.0)

    def kept(model: nn.Module) -> float:
        return (model(s.images).argmax(1) == weights(s.images).argmax(1)).float().mean().item()

    relearned = IBAU(solver=Restarted(schedule=schedule, forget=0.999, begin=1.0, radius=0.1)).repair(
        weights, s, seed=1
    )
    forgotten = [kept(forget(weights, 0.999, s.images, rng(seed))) for seed in range(10)]
    assert sum(forgotten) / 10 < 0.7
    assert kept(relearned.model) > 0.95


class Louder(nn.Module):
    """A model with other confidence and the same labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 5 * self.model(x)


def test_trusted_labels_are_labels_alone_and_only_those_that_a_variation_keeps() -> None:
    s, suspect, other = thirds(60), linear_thirds(), linear_thirds()
    with torch.no_grad():
        other[1].weight.add_(torch.randn(3, 81, generator=rng(5)))
    public = PublicImages(thirds(30).images)

    def loss(suspect: nn.Module, labels: torch.Tensor, public: PublicImages | None = None) -> float:
        with fast(other) as run:
            return TrustedLabels(suspect, public, rng(2))(run, s.images, labels).item()

    assert loss(Louder(suspect), s.labels) == loss(suspect, s.labels)
    half = torch.where(torch.arange(60) < 30, s.labels, (s.labels + 1) % 3)
    with fast(other) as run:
        varied = vary(s.images, rng(2))
        trusted = (suspect(varied).argmax(1) == half).nonzero()[:, 0]
        expected = F.cross_entropy(run(varied)[trusted], half[trusted]).item()
        of_all = F.cross_entropy(run(varied), half).item()
    assert 10 < len(trusted) < 50
    assert loss(suspect, half) == pytest.approx(expected, rel=1e-2)
    assert of_all != pytest.approx(expected, rel=0.1)
    assert loss(suspect, s.labels, public) != loss(suspect, s.labels)


def test_what_is_forgotten_leaves_something() -> None:
    with pytest.raises(InputError, match="forget"):
        Restarted(forget=1.0)


def test_the_restarted_solver_has_a_name_of_its_own() -> None:
    """For studies, whose files cannot name a solver."""
    assert defenses["ibau_restarted"]().solver == Restarted()
    assert defenses["ibau_restarted"]().settings() != defenses["ibau"]().settings()
