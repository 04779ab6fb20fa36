"""Erasure: families of triggers, the search for them, and the closed form, against direct computations."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smi
from smi.attacks import WaNet
from smi.erasure.directions import directions
from smi.erasure.families import changed, families
from smi.erasure.head import RIDGE, erase, features, head_of
from smi.erasure.search import PROBED, Found, Search, search
from smi.erasure.tune import Tuning, tune
from smi.models.classifiers import build_classifier
from smi.models.store import load_classifier
from smi.runtime.compute import fast, frozen
from smi.runtime.job import Job
from smi.runtime.seeding import stream

IMAGES = torch.rand(5, 3, 8, 6, generator=torch.Generator().manual_seed(0))


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Families -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(families))
def test_stamps_are_images_and_differentiable(name):
    family = families[name]
    numbers = family.start(4, IMAGES.shape[1:], torch.Generator().manual_seed(0))
    numbers = (3 * numbers).requires_grad_()
    shown = family.stamp(numbers, IMAGES)
    assert shown.shape == (4, *IMAGES.shape)
    assert shown.amin() >= 0
    assert shown.amax() <= 1
    assert (shown != IMAGES).any((1, 2, 3, 4)).all()
    for value in (shown.square().sum((1, 2, 3, 4)), family.size(numbers, IMAGES.shape[1:])):
        gradient = torch.autograd.grad(value[1], numbers, retain_graph=True)[0]
        assert gradient[1].abs().max() > 0
        assert (gradient[[0, 2, 3]] == 0).all()  # candidates do not meet


@pytest.mark.parametrize("name", list(families))
def test_a_candidate_stamps_alike_alone_and_among_others(name):
    numbers = families[name].start(3, IMAGES.shape[1:], torch.Generator().manual_seed(0))
    alone = families[name].stamp(numbers[1:2], IMAGES[2:3])
    torch.testing.assert_close(families[name].stamp(numbers, IMAGES)[1:2, 2:3], alone)


def test_a_mask_of_one_shows_the_pattern_and_one_of_zero_the_image():
    family, shape = families["masked"], IMAGES.shape[1:]
    mask = torch.full((8, 6), -50.0)
    mask[:3, :2] = 50.0
    numbers = torch.cat([mask.flatten(), drawn(3 * 48)])[None]
    shown = family.stamp(numbers, IMAGES)[0]
    assert torch.equal(shown[:, :, 3:], IMAGES[:, :, 3:])
    pattern = numbers[0, 48:].view(3, 8, 6).sigmoid()
    torch.testing.assert_close(shown[:, :, :3, :2], pattern[:, :3, :2].expand(5, -1, -1, -1))
    torch.testing.assert_close(family.size(numbers, shape), torch.tensor([6.0]))


def test_sizes_are_those_of_what_is_added():
    shape = IMAGES.shape[1:]
    additive = 0.1 * drawn(2, 144)
    torch.testing.assert_close(families["additive"].size(additive, shape), additive.norm(dim=1))
    smooth = families["smooth"].start(2, shape, torch.Generator().manual_seed(0))
    grey = torch.full((1, *shape), 0.5)
    delta = families["smooth"].stamp(smooth, grey)[:, 0] - grey
    torch.testing.assert_close(families["smooth"].size(smooth, shape), delta.square().mean((1, 2, 3)).sqrt())


def test_a_warp_of_zero_is_none_and_one_of_a_pixel_shifts():
    family = families["warped"]
    torch.testing.assert_close(family.stamp(torch.zeros(1, 50), IMAGES)[0], IMAGES)
    right = torch.zeros(1, 50)
    right[0, :25] = 1.0  # x: one pixel
    torch.testing.assert_close(family.stamp(right, IMAGES)[0][..., :-1], IMAGES[..., 1:])
    torch.testing.assert_close(family.size(right, IMAGES.shape[1:]), torch.tensor([1.0]))


def test_a_warp_is_wanets():
    """Its field is in units of half a pixel of side / (side − 1)."""
    images, attack = torch.rand(2, 1, 32, 32), WaNet(target=0, grid=5)
    field = attack.field(images) * 31 / 64  # [1, 32, 32, 2], in pixels
    coarse = F.interpolate(field.permute(0, 3, 1, 2), size=(5, 5), mode="bilinear", align_corners=True)
    shown = families["warped"].stamp(coarse.reshape(1, 50), images)[0]
    assert (shown - attack.stamp(images)).abs().mean() < 0.25 * (images - attack.stamp(images)).abs().mean()


@pytest.mark.parametrize("name", list(families))
def test_a_random_change_is_each_images_own_and_of_the_families_kind(name):
    family, grey = families[name], torch.full((40, 2, 32, 32), 0.5)
    rough = torch.rand(1, 2, 32, 32, generator=torch.Generator().manual_seed(1)).expand(40, -1, -1, -1)
    for images in (grey, rough):
        before, rng = images.clone(), torch.Generator().manual_seed(0)
        shown = family.change(images, rng)
        assert torch.equal(images, before)
        assert shown.shape == images.shape
        assert shown.amin() >= 0
        assert shown.amax() <= 1
        assert torch.equal(shown, family.change(images, torch.Generator().manual_seed(0)))
        off = shown - images
        if name == "warped":  # moves what is there, and of one grey there is nothing to move
            assert (off.abs().amax((1, 2, 3)) > 1e-4).all() == (images is rough)
            continue
        assert len({tuple(one.flatten().tolist()) for one in shown}) == 40
        if images is rough:
            continue
        if name == "masked":
            share = (off != 0).any(1).float().mean((1, 2))
            assert 0 < share.max() <= 3 * family.strength**2
        else:
            size = off.square().mean((1, 2, 3)).sqrt()
            assert 0.6 * family.strength < size.max() <= 1.1 * family.strength
            assert size.min() < 0.2 * family.strength
            steps = off[..., 1:] - off[..., :-1]  # from pixel to pixel: large in noise, small in what is smooth
            assert (steps.square().mean() > off.square().mean()) == (name == "additive")


def test_changes_of_all_families_are_mixed():
    images = torch.full((9, 1, 16, 16), 0.5)
    shown = changed(images, torch.Generator().manual_seed(0))
    kept = (shown - images).abs().amax((1, 2, 3)) < 1e-5
    assert kept.tolist() == [False] * 7 + [True] * 2, "three of noise, two each of patches, smooth patterns and warps"
    assert changed(images[:2], torch.Generator().manual_seed(0)).shape == (2, 1, 16, 16)


# Tuning -------------------------------------------------------------------------------------------------------------


def test_random_changes_alone_take_much_of_a_backdoor_and_little_accuracy(digits, few_digits):
    victim, evaluator = load_classifier("digits-badnets"), smi.Evaluator(digits.private.test, smi.attacks.BadNets())
    before = evaluator.measure(victim)
    curve = tune(victim, few_digits, digits.public, [], Tuning(), stream(0, "tune"), Job())
    after = evaluator.measure(victim)
    assert len(curve) == Tuning().steps
    assert sum(curve[-50:]) < sum(curve[:50])
    assert before.asr > 0.9
    assert after.asr < 0.7
    assert before.acc - after.acc < 0.02


def test_a_share_of_the_changes_are_found_triggers(monkeypatch):
    images, seen = torch.full((16, 1, 8, 8), 0.5), []
    samples = smi.Samples(images, torch.zeros(16, dtype=torch.long), 2, "clean")
    monkeypatch.setattr("smi.erasure.tune.changed", lambda some, rng: seen.append(len(some)) or some)
    monkeypatch.setattr("smi.erasure.tune.stamped", lambda some, labels, *_: seen.append(len(labels)) or some)
    model, numbers = nn.Sequential(nn.Flatten(), nn.Linear(64, 2)), torch.zeros(1, 64)
    for target, count in ((1, 4), (None, 0)):
        one = Found("additive", torch.tensor([1]), numbers, torch.ones(1), torch.ones(1))
        found = [one] if target else [one.select(torch.tensor([], dtype=torch.long))]
        seen.clear()
        tune(model, samples, None, found, Tuning(steps=1, batch_size=16), stream(0, "tune"), Job())
        assert seen == [16 - count, count]


# The closed form ----------------------------------------------------------------------------------------------------


def projection(natural, directions):
    """P in float64, as the docstring has it."""
    centred = (natural - natural.mean(0)).double()
    covariance = centred.T @ centred / len(natural)
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    d, inverse = directions.double(), covariance.inverse()
    return torch.eye(len(covariance), dtype=torch.float64) - d.T @ (d @ inverse @ d.T).inverse() @ d @ inverse


@pytest.fixture
def layer():
    """A linear layer with features of unequal, correlated directions, and two directions."""
    torch.manual_seed(0)
    natural = drawn(200, 12) @ drawn(12, 12, seed=1) + 3 * drawn(1, 12, seed=2)
    return nn.Linear(12, 4), natural, drawn(2, 12, seed=3)


def test_the_layer_is_what_projecting_before_it_gives(layer):
    linear, natural, directions = layer
    old = nn.Linear(12, 4)
    old.load_state_dict(linear.state_dict())
    P = projection(natural, directions)
    mean = natural.double().mean(0)
    expected = old.double()((natural.double() - mean) @ P.T + mean)
    erase(linear, natural, directions)
    torch.testing.assert_close(linear(natural).double(), expected, rtol=1e-3, atol=2e-3)


def test_the_span_is_erased_and_what_is_uncorrelated_stays(layer):
    linear, natural, directions = layer
    before, moved = linear.weight.detach().clone(), linear(natural).detach()
    erase(linear, natural, directions)
    mixed = torch.tensor([[0.7, -2.0]]) @ directions
    assert (linear.weight @ mixed.T).norm() < 2e-3 * (before @ mixed.T).norm()
    # u with D Σ⁻¹ u = 0 is a combination that P keeps: P u = u.
    P = projection(natural, directions)
    kept = (P @ drawn(12, 1, seed=4).double()).float()[:, 0]
    torch.testing.assert_close(linear.weight @ kept, before @ kept, rtol=1e-3, atol=1e-3)
    assert (linear(natural) - moved).abs().max() > 0.01  # it was no empty edit


def test_no_other_projection_moves_samples_less(layer):
    _, natural, directions = layer
    centred, d = (natural - natural.mean(0)).double(), directions.double()
    P = projection(natural, directions)

    def moved(other):
        return (centred - centred @ other.T).square().sum().item()

    for seed in range(5):
        metric = drawn(12, 12, seed=seed).double()
        metric = metric @ metric.T + 0.1 * torch.eye(12, dtype=torch.float64)
        other = torch.eye(12, dtype=torch.float64) - d.T @ (d @ metric @ d.T).inverse() @ d @ metric
        assert (other @ d.T).abs().max() < 1e-8
        assert moved(P) <= moved(other)
    orthogonal = torch.eye(12, dtype=torch.float64) - d.T @ (d @ d.T).inverse() @ d
    assert moved(P) < 0.99 * moved(orthogonal)


def test_without_a_bias_none_appears(layer):
    _, natural, directions = layer
    bare = nn.Linear(12, 4, bias=False)
    before = bare.weight.detach().clone()
    erase(bare, natural, directions)
    assert bare.bias is None
    assert (bare.weight @ directions.T).norm() < 2e-3 * (before @ directions.T).norm()


# Which layer --------------------------------------------------------------------------------------------------------


def ending(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), *layers).eval()


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (build_classifier("small_cnn", 3, 7), "body.7"),
        (build_classifier("resnet18", 3, 7), "body.11"),
        (ending(nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), nn.Linear(20, 5)), "5"),
        (ending(nn.Flatten(), nn.Dropout(), nn.Linear(96, 5), nn.Dropout()), "4"),
        (ending(nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()), "2"),
    ],
    ids=["pooled", "residual", "hidden", "dropout", "convolution"],
)
def test_the_layer_of_the_logits(model, name):
    images = torch.rand(4, 3, 8, 6) if not name.startswith("body") else torch.rand(4, 3, 32, 32)
    model.eval()
    head = head_of(model, images)
    assert head.name == name
    found = features(model, head, images)
    assert found.shape == (4, head.weight.shape[1])
    with torch.no_grad():
        logits = found @ head.weight.T + head.layer.bias
        torch.testing.assert_close(logits, model(images), rtol=1e-2, atol=1e-2)


def test_a_model_without_such_a_layer():
    with pytest.raises(smi.InputError, match="not the output of its last linear layer"):
        head_of(ending(nn.Flatten(), nn.Linear(96, 5), nn.Softmax(1)), IMAGES)


# Search, erasure, tuning --------------------------------------------------------------------------------------------


def test_several_starts_where_the_start_matters_and_fewer_images_until_a_trigger_settles():
    asked = []

    def run(images):
        asked.append(len(images))
        return images.flatten(1)[:, :4]

    images, labels = torch.rand(10, 1, 4, 4), torch.zeros(10, dtype=torch.int64)
    config = Search(families=("additive",), steps=4, images=6, restarts=3, probe=1)
    search(run, images, labels, [1, 2], config, stream(0, "search"))
    held = 2 * 3  # of ten images three are held out, and tried with each trigger
    assert sum(asked) == 2 * (2 * 3 + 2 * 6) + held
    asked.clear()
    search(run, images, labels, [1, 2], replace(config, families=("masked",)), stream(0, "search"))
    probing, comparing = 3 * 2 * 3, 3 * 2 * PROBED
    assert sum(asked) == probing + comparing + 2 * (3 + 2 * 6) + held


def test_a_backdoor_is_found_erased_and_tuned_away(digits, few_digits):
    victim, evaluator = load_classifier("digits-badnets"), smi.Evaluator(digits.private.test, smi.attacks.BadNets())
    with fast(frozen(victim)) as run:
        config = Search(families=("additive", "masked"), steps=25, restarts=1)
        found = search(run, few_digits.images, few_digits.labels, range(10), config, stream(0, "search"))
    for one in found:
        assert one.size.argmin() == 0
        assert one.size[0] < 0.5 * one.size.median()
        assert one.reach[0] > 0.5
    before, head = evaluator.measure(victim), head_of(victim, few_digits.images[:2])
    chosen = [one.select(torch.tensor([0])) for one in found]
    erase(head.layer, features(victim, head, few_digits.images), directions(victim, head, few_digits, chosen))
    erased = evaluator.measure(victim)
    assert before.asr > 0.9
    assert erased.asr < 0.2
    assert before.acc - erased.acc < 0.02
    tune(victim, few_digits, digits.public, chosen, Tuning(), stream(0, "tune"), Job())
    tuned = evaluator.measure(victim)
    assert tuned.asr < 0.1
    assert before.acc - tuned.acc < 0.02
