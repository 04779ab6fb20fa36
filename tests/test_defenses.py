"""Defenses: the interface, the roles, the inner problem, and each solver's defining term."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

import pytest
import torch
from thirds import rng, samples, thirds
from tiny import check_repair, tiny_model
from torch import nn
from torch.nn import functional as F

from smi.attacks import BadNets
from smi.classifiers import build_classifier
from smi.compute import fast
from smi.defenses import IBAU, FineTune, Published, Restarted, Robust, Schedule, defenses, ibau_robust
from smi.defenses.base import LARGEST_STEP, Distillation, _warm_cosine, bearable, recognised
from smi.defenses.ibau_robust import _Adversary, _PseudoLabelled
from smi.defenses.universal import natural_radius, universal
from smi.domains import PrivateSet, PublicImages, Samples
from smi.errors import InputError

QUICK = Schedule(rounds=2, batch_size=12)


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


@pytest.mark.parametrize("known", [True, False])
def test_ibau_uses_public_images_only_where_the_suspect_recognises_something(monkeypatch, known: bool) -> None:
    asked, stamped, held = [], [], []

    class Stamped(ibau_robust._PseudoLabelled):
        def __init__(self, model, public, rng) -> None:
            stamped.append(public)
            super().__init__(model, public, rng)

    class Held(ibau_robust.TrustedAnswers):
        def __init__(self, model, public, rng, **settings) -> None:
            held.append(public)
            super().__init__(model, public, rng, **settings)

    def recognised(model: nn.Module, public: PublicImages) -> PublicImages | None:
        asked.append(public)
        return public if known else None

    monkeypatch.setattr(ibau_robust, "recognised", recognised)
    monkeypatch.setattr(ibau_robust, "_PseudoLabelled", Stamped)
    monkeypatch.setattr(ibau_robust, "TrustedAnswers", Held)
    seen = PublicImages(samples(40).images)
    solver = Robust(radius=1.0, schedule=Schedule(rounds=1))
    IBAU(solver=solver).repair(tiny_model(), samples(40), seen)
    assert asked == [seen]
    assert (stamped, held) == (([seen], [seen]) if known else ([], [None]))


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
    s, public, model = samples(80), PublicImages(torch.ones(9, 1, 8, 8)), tiny_model()
    model.body[4].weight.data *= 10  # sure of its answers, whatever they are: others would not count
    seen = []

    def keep(self, images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images

    monkeypatch.setattr(_Adversary, "stamp", keep)
    for share in (0.0, 2.0):
        Robust(schedule=Schedule(rounds=1, batch_size=8), radius=0.1, steps=1, public=share).solve(model, s, public, 0)
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


@pytest.mark.parametrize("bad", [{"rounds": 0}, {"batch_size": 1}, {"lr": -1.0}, {"distill": -1.0}])
def test_a_schedule_is_checked(bad) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Schedule(**bad)


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
