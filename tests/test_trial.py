"""The trial step: as long as it may be, and no longer."""

from __future__ import annotations

import copy

import pytest
import torch
from thirds import linear_thirds, rng, thirds
from tiny import tiny_model
from torch import nn
from torch.nn import functional as F

from smi.compute import precision
from smi.defenses import IBAU, Restarted, Robust, Schedule
from smi.defenses.trial import LENGTH, SHORTER, tried
from smi.domains import Samples
from smi.errors import InputError

S = thirds(60)
DELTA = 0.3 * torch.randn(4, 1, 9, 9, generator=rng(1))


def moved(model: nn.Module, lr: float) -> float:
    """KL(model ‖ model after the step) by hand, in float64."""
    before, after = copy.deepcopy(model).double(), copy.deepcopy(model).double()
    images, delta = S.images.double(), DELTA.double()
    stamped = torch.stack([(image + delta[i % 4]).clamp(0, 1) for i, image in enumerate(images)])
    F.cross_entropy(after(stamped), S.labels).backward()
    with torch.no_grad():
        for weight in after.parameters():
            assert weight.grad is not None
            weight -= lr * LENGTH * weight.grad.sign()
        p, q = before(images).log_softmax(1), after(images).log_softmax(1)
        return (p.exp() * (p - q)).sum(1).mean().item()


@pytest.mark.parametrize("lr", [2.0, 5.0, 20.0])
def test_the_rate_is_the_largest_trial_that_moves_the_answers_no_further_than_the_limit(lr: float) -> None:
    model = linear_thirds()
    limit = moved(model, 3.0)
    with precision("float32"):
        found = tried(model, S.images, S.labels, DELTA, lr, limit)
    assert moved(model, found) <= limit
    if moved(model, lr) <= limit:
        assert found == lr
    else:
        assert moved(model, found / SHORTER) > limit
    assert [moved(model, rate) <= limit for rate in (2.0, 5.0, 20.0)] == [True, False, False]


def test_it_ends_at_a_hundredth_where_no_rate_is_bearable() -> None:
    assert 0.01 < tried(linear_thirds(), S.images, S.labels, DELTA, 1.0, -1.0) < 0.02


def test_it_leaves_the_model_and_takes_weights_that_nothing_depends_on() -> None:
    model = linear_thirds()
    model.unused = nn.Parameter(torch.ones(2))
    before = copy.deepcopy(model.state_dict())
    with precision("float32"):
        assert tried(model, S.images, S.labels, DELTA, 20.0, 0.1) == tried(
            linear_thirds(), S.images, S.labels, DELTA, 20.0, 0.1
        )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_repair_takes_the_rate_that_its_trial_allows() -> None:
    generator = rng(3)
    s = Samples(torch.rand(60, 1, 8, 8, generator=generator), torch.arange(60) % 3, 3, "smi")
    rates = {}
    for trial in (0.0, 1e9, 1e-3):
        solver = Robust(schedule=Schedule(rounds=1, lr=0.1), trial=trial, radius=1.0, images=10, targets=2)
        rates[trial] = IBAU(solver=solver).repair(tiny_model(), s).log["lr"]
    assert rates[1e9] == rates[0.0]
    assert rates[1e-3] < 0.9 * rates[0.0]
    assert not Restarted().trial, "there is little that a step could wreck"
    with pytest.raises(InputError, match="trial"):
        Robust(trial=-1.0)
