"""Defenses: the interface, the roles, the inner problem, and each solver's defining term."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from tiny import check_repair, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.attacks import BadNets
from smi.augment import vary
from smi.classifiers import build_classifier
from smi.compute import fast, frozen
from smi.defenses import IBAU, FineTune, Published, Restarted, Robust, Schedule, defenses, ibau_robust
from smi.defenses.base import LARGEST_STEP, Distillation, _warm_cosine, bearable, recognised
from smi.defenses.channels import watch
from smi.defenses.ibau_robust import _Adversary, _PseudoLabelled
from smi.defenses.restart import TrustedLabels, forget
from smi.defenses.universal import AWAY, concentrate, data_scale, fooling_rate, into_ball, natural_radius, universal
from smi.domains import PrivateSet, PublicImages, Samples
from smi.errors import InputError

QUICK = Schedule(rounds=2, batch_size=12)


def samples(n: int = 24, classes: int = 3, size: int = 8, seed: int = 0) -> Samples:
    rng = torch.Generator().manual_seed(seed)
    return Samples(torch.rand(n, 1, size, size, generator=rng), torch.arange(n) % classes, classes, "smi")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ALL = [
    FineTune(schedule=QUICK),
    IBAU(solver=Robust(schedule=QUICK, steps=2, images=6)),
    IBAU(solver=Restarted(schedule=QUICK, steps=2, images=6)),
    IBAU(solver=Published(rounds=1, inner_steps=2, batch_size=12)),
]


@pytest.mark.parametrize("defense", ALL, ids=["ft", "ibau/robust", "ibau/restarted", "ibau/published"])
def test_repair_changes_a_copy_and_only_a_copy_and_repeats(defense) -> None:
    public, solver = PublicImages(torch.rand(9, 1, 8, 8, generator=rng(4))), getattr(defense, "solver", None)
    check_repair(defense, samples(), public, keeps_statistics=not getattr(solver, "forget", 0))


@pytest.mark.parametrize("defense", ALL, ids=["ft", "ibau/robust", "ibau/restarted", "ibau/published"])
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


def test_public_images_count_only_where_the_suspect_recognises_something_in_them() -> None:
    images, seen = samples(40).images, PublicImages(samples(40).images)
    sure, unsure = tiny_model(), tiny_model()
    with torch.no_grad():
        for model, scale in ((sure, 1e3), (unsure, 0.0)):  # of the logits
            last = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)][-1]
            last.weight *= scale
            last.bias *= 0
    assert recognised(sure, seen) is seen
    assert recognised(unsure, seen) is None
    assert recognised(sure, None) is None
    for model, asked in ((sure, 80), (unsure, 40)):
        shown: list[int] = []
        hook = model.register_forward_pre_hook(lambda _, given, shown=shown: shown.append(len(given[0])))
        Distillation(model, seen, rng(0))(model, images)
        hook.remove()
        assert shown[-1] == asked


def test_ibau_stamps_public_images_only_where_the_suspect_recognises_something(monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(ibau_robust, "recognised", lambda model, public: asked.append(public))
    monkeypatch.setattr(ibau_robust, "_PseudoLabelled", None)  # calling it would fail
    seen = PublicImages(samples(40).images)
    solver = Robust(radius=1.0, schedule=Schedule(rounds=1))
    IBAU(solver=solver).repair(tiny_model(), samples(40), seen)
    assert asked == [seen]


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


@pytest.mark.parametrize(("needed", "taken"), [(4, 4), (5, 12), (12, 12), (13, 36), (99, 36)])
def test_where_few_steps_reach_no_class_it_takes_more_and_all_searches_do(monkeypatch, needed: int, taken: int) -> None:
    asked = []

    def lazy(*given: Any, steps: int, **settings: Any) -> torch.Tensor:
        asked.append(steps)
        return universal(*given, steps=steps, **settings) * (steps >= needed)

    for module in (sys.modules[natural_radius.__module__], ibau_robust):
        monkeypatch.setattr(module, "universal", lazy)
    monkeypatch.setattr(ibau_robust, "_radii", OrderedDict())
    model = tiny_model()  # each class is reached in few steps
    adversary = _Adversary(Robust(steps=4, images=20), model, samples(60), None, rng())
    assert adversary.steps == taken == asked[-1]
    adversary.search(model, torch.arange(3), 1.0)
    assert asked[-1] == taken


def test_the_learning_rate_is_what_the_model_bears(monkeypatch) -> None:
    small, deep = (build_classifier(name, 1, 3) for name in ("small_cnn", "resnet18"))
    assert bearable(small, 3e-3) == 3e-3
    for lr in (3e-3, 1e-2):
        found = bearable(deep, lr)
        shares = [found / w.detach().square().mean().sqrt().item() for w in deep.parameters() if w.ndim > 1]
        assert sum(shares) == pytest.approx(LARGEST_STEP, rel=1e-4)
    assert bearable(deep, 1e-5) == 1e-5
    silent = nn.Linear(3, 3)
    nn.init.zeros_(silent.weight)  # some networks begin, or end, with such layers
    assert bearable(silent, 0.1) == 0.1
    monkeypatch.setattr("smi.defenses.base.bearable", lambda model, lr: 0.0)
    still = FineTune(schedule=QUICK).repair(small, samples()).model
    assert all(torch.equal(a, b) for a, b in zip(still.parameters(), small.parameters(), strict=True))


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


class Learned(nn.Module):
    """`PatchBackdoor` with weights: one for each feature, so that the corner can be unlearned."""

    def __init__(self) -> None:
        super().__init__()
        self.thirds = nn.Parameter(torch.tensor(2.0))
        self.corner = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        brightness = torch.stack([x[..., k : k + 3].mean((1, 2, 3)) for k in (0, 3, 6)], 1)
        backdoor = 10 * torch.relu(x[:, :, 7:, 7:].mean((1, 2, 3)) - 0.02) * self.corner
        return 10 * self.thirds * brightness + torch.stack([backdoor, 0 * backdoor, 0 * backdoor], 1)


def test_robust_unlearns_what_fine_tuning_leaves() -> None:
    """The defining term: without stamped δ's (fine-tuning at the same schedule) the corner still decides."""
    s, schedule = thirds(210), Schedule(rounds=6, batch_size=21, lr=0.1, weight_decay=0.0, distill=1.0)
    patched = s.images[s.labels != 0].clone()
    patched[:, :, 7:, 7:] = 1.0

    def success(model: nn.Module) -> float:
        return (model(patched).argmax(1) == 0).float().mean().item()

    assert success(Learned()) == 1.0
    tuned = FineTune(schedule=schedule).repair(Learned(), s).model
    unlearned = IBAU(solver=Robust(schedule=schedule, radius=1.5)).repair(Learned(), s).model
    assert success(tuned) == 1.0
    assert success(unlearned) == 0.0
    assert (unlearned(s.images).argmax(1) == s.labels).float().mean() == 1.0


def test_the_radius_is_that_of_public_images_whatever_the_samples_are() -> None:
    """Samples chosen for stability are hard to fool; where there are public images they do not ask them."""
    quick, few = Robust(schedule=QUICK, images=30), Robust(schedule=QUICK, images=5)
    faint = Samples(thirds(60).images / 4, thirds(60).labels, 3, "smi")

    def radius(s: Samples, public: PublicImages | None, solver: Robust = quick) -> float:
        return solver.solve(Learned(), s, public, 0)[1]["radius"]

    bright = PublicImages(thirds(60).images)
    assert radius(faint, bright, few) == radius(thirds(30), bright, few)
    assert radius(faint, None) < radius(thirds(60), None) / 2
    assert radius(thirds(60), PublicImages(faint.images)) == pytest.approx(radius(faint, None), rel=0.35)


def test_a_second_repair_of_one_suspect_asks_for_no_second_radius_and_is_the_same(monkeypatch) -> None:
    asked: list[tuple[float, int]] = []

    def counted(*given: Any, **settings: Any) -> tuple[float, int]:
        asked.append(natural_radius(*given, **settings))
        return asked[-1]

    monkeypatch.setattr(ibau_robust, "natural_radius", counted)
    monkeypatch.setattr(ibau_robust, "_radii", OrderedDict())
    defense, public = IBAU(solver=Robust(schedule=QUICK, steps=2, images=6)), PublicImages(torch.rand(20, 1, 8, 8))
    model, s = tiny_model(), samples()
    first, second = defense.repair(model, s, public).model, defense.repair(model, s, public).model
    assert len(asked) == 1
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    defense.repair(model, s, public, seed=1)
    assert len(asked) == 2
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    defense.repair(model, s, public)
    assert len(asked) == 3
    defense.repair(model, s)
    IBAU(solver=Robust(schedule=QUICK, steps=3, images=6)).repair(model, s, public)
    assert len(asked) == 5


def test_what_is_unlearned_reaches_beyond_the_natural_radius_and_what_is_shown_does_not(monkeypatch) -> None:
    lengths = []

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        lengths.append(self.delta.flatten(1).norm(dim=1).max().item())
        return images

    monkeypatch.setattr(_Adversary, "stamp", keep)
    _, log, shown = Robust(schedule=QUICK, reach=2.5).solve(Learned(), thirds(60), None, 0)
    assert shown.flatten(1).norm(dim=1).max() <= log["radius"] * 1.0001
    assert max(lengths) == pytest.approx(2.5 * log["radius"], rel=0.05)
    lengths.clear()
    Robust(schedule=QUICK, reach=2.5, radius=0.7).solve(Learned(), thirds(60), None, 0)
    assert max(lengths) == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(("classes", "targets"), [(14, 2), (9, 20)])
def test_every_class_has_a_perturbation_within_two_rounds(classes: int, targets: int) -> None:
    config = Robust(radius=2.0, steps=2, images=8, targets=targets)
    model, s = tiny_model(classes=classes), samples(60, classes=classes)
    adversary = _Adversary(config, model, s, None, rng())
    for index in range(2):
        adversary.before_round(model, index)
        searched = (adversary.delta.flatten(1).norm(dim=1) > 0).sum()
        assert searched == (classes + 1 if index or targets > classes else 8)


@pytest.mark.parametrize(("classes", "share"), [(14, 1 / (1 + 14 * 0.1**2)), (8, 1 / 9)])
def test_of_many_classes_those_that_stand_out_at_the_natural_radius_are_stamped(classes, share, monkeypatch) -> None:
    def search(self, model: nn.Module, targets: torch.Tensor, radius: float) -> dict[str, torch.Tensor]:
        found = ((targets + 2) / 100).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)
        natural = torch.where(targets == 3, 1.0, 0.1)
        return {"delta": found, "rates": torch.ones(len(targets)), "natural": natural}

    monkeypatch.setattr(_Adversary, "search", search)
    monkeypatch.setattr(ibau_robust, "concentrate", lambda delta, share: delta)
    config, model = Robust(radius=2.0, targets=6 if classes == 14 else classes), tiny_model(classes=classes)
    adversary = _Adversary(config, model, samples(60, classes=classes), None, rng())
    for index in range(2):
        adversary.before_round(model, index)
    stamped = adversary.stamp(torch.zeros(4000, 1, 8, 8))[:, 0, 0, 0]
    assert (stamped == 0.05).float().mean().item() == pytest.approx(share, abs=0.03)
    assert len(stamped.unique()) == classes + 1, "the others have their share"


@pytest.mark.parametrize(("classes", "share"), [(11, 1.0), (23, 0.5)])
def test_clean_behaviour_is_held_less_firmly_where_more_perturbations_are_stamped(classes, share, monkeypatch) -> None:
    weights = []

    def clean(self, run, hold, weight: float, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        weights.append(weight)
        return F.cross_entropy(run(images), labels)

    monkeypatch.setattr(Robust, "_clean", clean)
    schedule = Schedule(rounds=1, distill=8.0)
    Robust(schedule=schedule, radius=0.1, steps=1).solve(tiny_model(classes=classes), samples(48, classes), None, 0)
    assert set(weights) == {8.0 * share}


def test_public_images_are_stamped_with_the_suspects_labels(monkeypatch) -> None:
    s, public = samples(80), PublicImages(torch.ones(9, 1, 8, 8))
    seen = []

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images

    monkeypatch.setattr(_Adversary, "stamp", keep)
    for share in (0.0, 2.0):
        Robust(schedule=Schedule(rounds=1, batch_size=8), radius=0.1, steps=1, public=share).solve(
            tiny_model(), s, public, 0
        )
    without, twice = seen[:10], seen[10:]
    assert [len(batch) for batch in without] == [4] * 10
    assert [len(batch) for batch in twice] == [12] * 10
    assert all(torch.equal(few, many[:4]) for few, many in zip(without, twice, strict=True))
    drawn = _PseudoLabelled(tiny_model(), PublicImages(samples(40).images), rng(2))
    images, labels = drawn.draw(30)
    assert torch.equal(labels, tiny_model()(images).argmax(1))
    assert len(labels.unique()) > 1


@pytest.mark.parametrize(("solver", "steps"), [(Robust, 10), (Restarted, 3)])
def test_few_samples_are_cut_into_as_many_steps_as_the_solver_needs(solver, steps, monkeypatch) -> None:
    schedules = []

    def keep(model, samples, schedule, *rest, **options):
        schedules.append(schedule)
        return model, []

    monkeypatch.setattr("smi.defenses.ibau_robust.train_repair", keep)
    for n in (120, 3000):
        solver(schedule=Schedule(batch_size=100), radius=0.1, steps=1, images=2).solve(
            tiny_model(), samples(n), None, 0
        )
    assert [schedule.batch_size for schedule in schedules] == [120 // steps, 100]


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


def test_distillation_is_zero_for_the_suspect_itself_and_pulls_towards_it() -> None:
    model, public = tiny_model(), PublicImages(torch.rand(20, 1, 8, 8, generator=rng(4)))
    other = tiny_model(seed=1)
    with fast(model) as run, fast(other) as run_other:
        same = Distillation(model, public, rng())(run, samples().images)
        different = Distillation(model, public, rng())(run_other, samples().images)
    assert abs(same.item()) < 1e-4
    assert different.item() > 0.1


def test_published_share_never_rounds_to_nothing() -> None:
    seen = {}
    for stamped in (0.001, 0.5):
        solver = Published(rounds=1, inner_steps=1, batch_size=10, stamped=stamped)
        problem = solver._problem(lambda x, _: x.flatten(1)[:, :3], torch.zeros(10, 1, 8, 8), torch.zeros(10).long())
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


@pytest.mark.parametrize(
    "bad",
    [
        {"stamped": 0.0},
        {"public": -1.0},
        {"renew": 0},
        {"begin": 2.0},
        {"steps": 0},
        {"goal": 2.0},
        {"radius": -1.0},
        {"reach": 0.0},
        {"images": 1.5},
    ],
)
def test_robust_settings_are_checked(bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Robust(**bad)


def test_what_is_forgotten_leaves_something() -> None:
    with pytest.raises(InputError, match="forget"):
        Restarted(forget=1.0)


def test_the_restarted_solver_has_a_name_of_its_own() -> None:
    """For studies, whose files cannot name a solver."""
    assert defenses["ibau_restarted"]().solver == Restarted()
    assert defenses["ibau_restarted"]().settings() != defenses["ibau"]().settings()
