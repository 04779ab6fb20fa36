"""The restarted solver: what it forgets, and what it learns again."""

from __future__ import annotations

import pytest
import torch
from thirds import linear_thirds, rng, samples, thirds
from tiny import tiny_model
from torch import nn

from smi.defenses import IBAU, Restarted, Schedule, defenses
from smi.defenses.channels import watch
from smi.defenses.restart import forget
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


def test_what_is_forgotten_leaves_something() -> None:
    with pytest.raises(InputError, match="forget"):
        Restarted(forget=1.0)


def test_the_restarted_solver_has_a_name_of_its_own() -> None:
    """For studies, whose files cannot name a solver."""
    assert defenses["ibau_restarted"]().solver == Restarted()
    assert defenses["ibau_restarted"]().settings() != defenses["ibau"]().settings()
