"""Defenses: the interface, the roles, and what they share."""

from __future__ import annotations

import pytest
import torch
from thirds import QUICK, rng, samples
from tiny import check_repair, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.attacks import BadNets
from smi.defenses import IBAU, FineTune, Schedule, defenses
from smi.defenses.distillation import Distillation, confident_public
from smi.defenses.training import LARGEST_STEP, _warm_cosine, capped_rate
from smi.domains import PrivateSet, PublicImages, Samples
from smi.errors import InputError
from smi.models.classifiers import build_classifier
from smi.runtime.compute import fast

ALL = [
    FineTune(schedule=QUICK),
    IBAU(rounds=1, inner_steps=2, batch_size=12),
]


@pytest.mark.parametrize("defense", ALL, ids=["ft", "ibau"])
def test_repair_changes_a_copy_and_only_a_copy_and_repeats(defense) -> None:
    check_repair(defense, samples(), PublicImages(torch.rand(9, 1, 8, 8, generator=rng(4))))


@pytest.mark.parametrize("defense", ALL, ids=["ft", "ibau"])
def test_a_defense_takes_neither_private_data_nor_a_trigger(defense) -> None:
    s = samples()
    private = PrivateSet(s.images, s.labels, 3)
    with pytest.raises(InputError, match="PrivateSet"):
        defense.repair(tiny_model(), private)
    with pytest.raises(InputError, match="BadNets"):
        defense.repair(tiny_model(), BadNets(target=0))
    with pytest.raises(InputError, match="PublicImages"):
        defense.repair(tiny_model(), s, private)


def test_mismatches_are_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="classes"):
        FineTune().repair(tiny_model(classes=4), samples())
    with pytest.raises(InputError, match="Resize"):
        FineTune().repair(tiny_model(), samples(), PublicImages(torch.rand(4, 1, 16, 16)))
    broken = tiny_model()
    broken.body[0].weight.data[0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        FineTune().repair(broken, samples())
    with pytest.raises(InputError, match="Did you mean 'ibau'"):
        defenses["ibua"]


def test_public_images_count_only_where_the_suspect_recognises_something_in_them() -> None:
    images, seen = samples(40).images, PublicImages(samples(40).images)
    sure, unsure = tiny_model(), tiny_model()
    with torch.no_grad():
        for model, scale in ((sure, 1e3), (unsure, 0.0)):  # of the logits
            last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
            last.weight *= scale
            last.bias *= 0
    assert confident_public(sure, seen) is seen
    assert confident_public(unsure, seen) is None
    assert confident_public(sure, None) is None
    for model, asked in ((sure, 80), (unsure, 40)):
        shown: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, given, shown=shown: shown.append(len(given[0])))
        Distillation(model, seen, rng(0))(model, images)
        hook.remove()
        assert shown[-1] == asked


def test_the_learning_rate_is_what_the_model_bears(monkeypatch) -> None:
    small, deep = (build_classifier(name, 1, 3) for name in ("small_cnn", "resnet18"))
    assert capped_rate(small, 3e-3) == 3e-3
    for lr in (3e-3, 1e-2):
        found = capped_rate(deep, lr)
        shares = [found / w.detach().square().mean().sqrt().item() for w in deep.parameters() if w.ndim > 1]
        assert sum(shares) == pytest.approx(LARGEST_STEP, rel=1e-4)
    assert capped_rate(deep, 1e-5) == 1e-5
    silent = nn.Linear(3, 3)
    nn.init.zeros_(silent.weight)  # some networks begin, or end, with such layers
    assert capped_rate(silent, 0.1) == 0.1
    monkeypatch.setattr("smi.defenses.training.capped_rate", lambda model, lr: 0.0)
    still = FineTune(schedule=QUICK).repair(small, samples()).model
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), small.parameters(), strict=True))


def test_distillation_is_zero_for_the_suspect_itself_and_pulls_towards_it() -> None:
    model, public = tiny_model(), PublicImages(torch.rand(20, 1, 8, 8, generator=rng(4)))
    other = tiny_model(seed=1)
    with fast(model) as run, fast(other) as run_other:
        same = Distillation(model, public, rng())(run, samples().images)
        different = Distillation(model, public, rng())(run_other, samples().images)
    assert abs(same.item()) < 1e-4
    assert different.item() > 0.1


def test_ibaus_delta_stays_in_the_ball_and_raises_the_loss_that_it_then_trains_against() -> None:
    s, model = samples(), tiny_model()

    def loss(net: nn.Module, delta: torch.Tensor) -> float:
        return F.cross_entropy(net(s.images + delta), model(s.images).argmax(1)).item()

    for radius in (0.5, 2.0):
        own = Samples(s.images, model(s.images).argmax(1), 3, "smi")
        repair = IBAU(rounds=1, radius=radius, lr=0.01, stamped=1.0).repair(model, own)
        assert repair.delta.shape == (1, 1, 8, 8)
        assert repair.delta.norm().item() <= radius * 1.0001
        assert loss(model, repair.delta) > loss(model, 0 * repair.delta)
        assert loss(repair.model, repair.delta) < loss(model, repair.delta)


def test_ibaus_share_never_rounds_to_nothing() -> None:
    seen = {}
    for stamped in (0.001, 0.5):
        defense = IBAU(rounds=1, inner_steps=1, batch_size=10, stamped=stamped)
        problem = defense._problem(lambda x, _: x.flatten(1)[:, :3], torch.zeros(10, 1, 8, 8), torch.zeros(10).long())
        delta = torch.full((1, 1, 8, 8), 1.0)
        delta[..., 0, 0] = 3.0
        seen[stamped] = problem.outer(delta, []).item() != problem.outer(0 * delta, []).item()
    assert all(seen.values())


def test_schedule_warms_up_and_decays_to_zero() -> None:
    factor = _warm_cosine(100)
    assert factor(0) == pytest.approx(0.1)
    assert factor(10) == pytest.approx(1.0)
    assert factor(99) < 0.01
    assert all(factor(i) >= factor(i + 1) for i in range(10, 99))


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"batch_size": 1}, {"lr": -1.0}, {"distill": -1.0}])
def test_a_schedule_is_checked(bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Schedule(**bad)


@pytest.mark.parametrize(
    "bad", [{"rounds": 0}, {"inner_steps": 0}, {"iterations": 0.5}, {"stamped": 1.5}, {"radius": -1}]
)
def test_ibaus_settings_are_checked(bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        IBAU(**bad)
