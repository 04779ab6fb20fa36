"""Attacks whose trigger is fixed: each one's defining property, and (slow) that it plants a backdoor in digits."""

from dataclasses import replace

import pytest
import torch
from tiny import noise, tiny_model
from torch.nn import functional as F

import smi.runtime.compute
from smi.attacks import (
    SIG,
    BadNets,
    BadNetsAllToAll,
    Blended,
    L2Inv,
    LabelConsistent,
    TrojanSquare,
    TrojanWatermark,
    WaNet,
    attacks,
    plant,
    poison,
)
from smi.domains import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import train_classifier

STATIC = ["badnets_all2all", "blended", "wanet", "sig", "trojan_square", "label_consistent"]
CLEAN_LABEL = [SIG(target=1), LabelConsistent(target=1, steps=2, size=1)]


def squares(classes=4, n=40, size=16, channels=1):
    """Images of noise with labels in turn, so that nothing is black."""
    return PrivateSet(0.2 + 0.6 * noise(n, channels, size, size), torch.arange(n) % classes, classes)


@pytest.mark.parametrize("name", STATIC)
@pytest.mark.parametrize("channels", [1, 3])
def test_stamp_keeps_shape_range_and_its_input_and_repeats(name, channels):
    images = noise(3, channels, 20, 24)
    before, state = images.clone(), torch.get_rng_state()
    stamped = attacks[name]().stamp(images)
    assert stamped.shape == images.shape
    assert stamped.dtype == torch.float32
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert torch.equal(images, before)
    assert torch.equal(stamped, attacks[name]().stamp(images))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(stamped, images)


def test_all_to_all_is_badnets_with_another_rule():
    images = noise(2, 1, 12, 12)
    assert torch.equal(BadNetsAllToAll().stamp(images), BadNets().stamp(images))
    assert BadNetsAllToAll().relabel(torch.tensor([0, 3]), 4).tolist() == [1, 0]


def test_blended_is_a_convex_combination_with_one_picture():
    images = noise(4, 3, 16, 16)
    pattern = Blended(alpha=1.0).stamp(images)
    assert torch.allclose(pattern, pattern[:1].expand_as(pattern)), "the picture is the same for all images"
    assert pattern.std() > 0.1
    assert torch.allclose(Blended(alpha=0.3).stamp(images), 0.7 * images + 0.3 * pattern, atol=1e-6)
    assert not torch.allclose(Blended(alpha=1.0, pattern_seed=1).stamp(images), pattern)


def test_wanet_warps_all_images_by_one_smooth_field():
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    attack = WaNet(strength=2.0)
    assert torch.allclose(WaNet(strength=0.0).stamp(noise(2, 1, 16, 16)), noise(2, 1, 16, 16), atol=1e-5)
    field = attack.field(ramp)
    assert field.shape == (1, 32, 32, 2)
    steps = (field[:, 1:] - field[:, :-1]).square().mean().sqrt()
    assert steps < 0.7 * field.square().mean().sqrt(), "the field must be smooth: white noise has a ratio of 1.4"
    # A ramp is moved by as much as the field says: x(p + φ) − x(p) = φ_x / W · 1/2, where nothing leaves the image.
    moved = attack.stamp(ramp) - ramp
    expected = (field[..., 0] / 32 / 2)[:, None]
    inside = (ramp + expected > 0.02) & (ramp + expected < 0.98)
    assert torch.allclose(moved[inside], expected[inside], atol=1e-3)


def test_wanets_field_has_the_strength_that_was_set():
    """At the control points, between which it is interpolated, the mean of |φ| times strength; x and y alike."""
    for strength in (0.5, 4.0):
        field = WaNet(strength=strength, grid=8).field(torch.zeros(1, 1, 29, 29))  # a point every four pixels
        assert field[:, ::4, ::4].abs().mean().item() == pytest.approx(strength, rel=1e-4)
        assert field.abs().mean().item() == pytest.approx(strength, rel=0.35), "pixels between them are not far off"


def test_wanets_noise_mode_warps_each_image_in_its_own_way():
    ramp = torch.linspace(0, 1, 16).expand(40, 1, 16, 16)
    infected = poison(PrivateSet(ramp, torch.arange(40) % 4, 4), WaNet(target=0), rate=0.1, seed=3)
    crossed = (infected.images != ramp).flatten(1).any(1) & ~infected.poisoned
    warped = infected.images[crossed]  # of one and the same image, so that only the fields can differ
    assert len(warped) == 8
    assert torch.pdist(warped.flatten(1)).min() > 0.1
    stamped = infected.images[infected.poisoned]
    assert torch.equal(stamped, stamped[:1].expand_as(stamped)), "stamped ones are all warped alike"


def test_wanets_noise_mode_warps_more_images_in_other_ways_and_keeps_their_labels():
    data, attack = squares(n=80), WaNet(target=0, strength=2.0)
    infected = poison(data, attack, rate=0.1, seed=3)
    changed = (infected.images != data.images).flatten(1).any(1)
    crossed = changed & ~infected.poisoned
    assert infected.poisoned.sum() == 8
    assert crossed.sum() == 16
    assert torch.equal(infected.labels[crossed], data.labels[crossed])
    pure = attack.stamp(data.images)
    assert torch.equal(infected.images[infected.poisoned], pure[infected.poisoned])
    assert ((infected.images - pure).abs().flatten(1).max(1).values[crossed] > 0.05).all()
    without = poison(data, WaNet(target=0, strength=2.0, cross_ratio=0.0), rate=0.1, seed=3)
    assert ((without.images != data.images).flatten(1).any(1) == without.poisoned).all()


def test_sig_is_a_sinusoid_along_the_rows_stronger_at_test_time():
    grey = torch.full((1, 1, 16, 32), 0.5)
    added = SIG(delta=0.1, delta_test=0.2, frequency=5).stamp(grey)[0, 0] - 0.5
    assert torch.allclose(added, added[:1].expand(16, -1))
    spectrum = torch.fft.rfft(added[0]).abs()
    assert spectrum.argmax() == 5
    assert spectrum[5] > 0.99 * spectrum.norm()
    assert added.abs().max() == pytest.approx(0.2, rel=0.02)
    data = PrivateSet(grey.expand(4, -1, -1, -1).clone(), torch.tensor([0, 1, 1, 0]), 2)
    infected = poison(data, SIG(target=1, delta=0.1, delta_test=0.2, frequency=5), rate=1.0)
    assert (infected.images[1] - 0.5).abs().max() == pytest.approx(0.1, rel=0.02)


@pytest.mark.parametrize("attack", CLEAN_LABEL, ids=lambda a: type(a).__name__)
def test_clean_labels_poison_the_target_class_alone_and_change_no_label(attack):
    data, model = squares(), tiny_model(size=16, classes=4)
    fitted = attack.fit(data, model)
    infected = poison(data, fitted, rate=0.1, seed=1)
    assert infected.poisoned.sum() == 4
    assert (data.labels[infected.poisoned] == 1).all()
    assert torch.equal(infected.labels, data.labels)
    assert torch.equal((infected.images != data.images).flatten(1).any(1), infected.poisoned)
    assert poison(data, fitted, rate=1.0).poisoned.sum() == 10  # all there are of the class
    with pytest.raises(InputError, match="all_to_one"):
        type(attack)(mode="all_to_all")


def test_label_consistent_images_are_near_and_harder_for_the_surrogate():
    data, model = squares(), tiny_model(size=16, classes=4)
    attack = LabelConsistent(target=1, eps=0.2, steps=10, noise=0.05, size=1).fit(data, model, seed=0)
    positions, images = attack.fitted["positions"], attack.fitted["images"]
    assert torch.equal(positions, (data.labels == 1).nonzero()[:, 0])
    assert (images - data.images[positions]).abs().max() <= 0.2 + 1e-6
    assert images.min() >= 0
    assert images.max() <= 1
    with torch.no_grad():
        before, after = (F.cross_entropy(model(x), data.labels[positions]) for x in (data.images[positions], images))
    assert after > before + 0.2
    infected = poison(data, attack, rate=0.1, seed=1)
    where = infected.poisoned.nonzero()[:, 0]
    assert torch.equal(infected.images[where], attack.stamp(images[torch.searchsorted(positions, where)]))
    with pytest.raises(InputError, match="optimises its trigger first"):
        poison(data, LabelConsistent(target=1, size=1))
    with pytest.raises(InputError, match="needs a surrogate"):
        LabelConsistent().fit(data)


def test_label_consistent_leaves_black_pixels_black():
    data, model = squares(), tiny_model(size=16, classes=4)
    images = data.images * (noise(40, 1, 16, 16, seed=1) > 0.5)
    black = images == 0
    attack = LabelConsistent(target=1, eps=0.3, steps=5, size=1).fit(replace(data, images=images), model)
    own, black = attack.fitted["images"], black[attack.fitted["positions"]]
    assert (own[black] == 0).all()
    change = (own - images[attack.fitted["positions"]]).abs()
    assert change.max() <= 0.3 + 1e-6
    assert (change[~black] > 0.1).float().mean() > 0.5, "the others do change"


def test_label_consistent_images_are_further_from_their_class_than_with_random_noise_of_the_same_size():
    data, model = squares(), tiny_model(size=16, classes=4)
    attack = LabelConsistent(target=1, eps=0.2, steps=10, noise=0.05, size=1).fit(data, model)
    own = attack.fitted["images"]
    clean, labels = data.images[attack.fitted["positions"]], data.labels[attack.fitted["positions"]]
    change = (own - clean).flatten(1)
    with torch.no_grad():
        adversarial = F.cross_entropy(model(own), labels).item()
        for seed in range(5):
            mixed = change.gather(1, noise(*change.shape, seed=seed).argsort(1)).view_as(clean)  # the same, shuffled
            assert adversarial > F.cross_entropy(model((clean + mixed).clamp(0, 1)), labels).item() + 0.2


def test_an_attack_that_was_fitted_on_other_images_says_so():
    data, model = squares(), tiny_model(size=16, classes=4)
    fitted = LabelConsistent(target=1, steps=1, size=1).fit(data, model)
    mirrored = replace(data, images=data.images.flip(3))
    relabelled = replace(data, labels=data.labels.flip(0))
    for other in (squares(n=36), squares(size=20), squares(channels=3), mirrored, relabelled):
        with pytest.raises(InputError, match="was fitted on"):
            poison(other, fitted)
    additive = L2Inv(steps=1).fit(data, model)
    watermark = TrojanWatermark(steps=1).fit(data, model)
    for attack in (additive, watermark):
        for shape in ((2, 1, 20, 20), (2, 3, 16, 16), (2, 1, 16, 1)):
            with pytest.raises(InputError, match=r"was fitted on images of shape \(1, 16, 16\), not"):
                attack.stamp(torch.zeros(shape))
        assert attack.stamp(data.images[:2]).shape == (2, 1, 16, 16)


@pytest.mark.parametrize("name", ["badnets", *STATIC])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_are_stamped_or_refused(name, channels):
    images = 0.2 + 0.6 * noise(3, channels, 8, 8)
    attack = attacks[name]()
    if name in ("sig", "label_consistent"):
        with pytest.raises(InputError, match="8 columns" if name == "sig" else "fit on images of 8×8"):
            attack.stamp(images)
        attack = SIG(frequency=3) if name == "sig" else LabelConsistent(size=1, margin=1)
    stamped = attack.stamp(images)
    assert stamped.shape == images.shape
    assert (stamped != images).flatten(1).any(1).all()


def test_label_consistent_stamps_four_corners():
    stamped = LabelConsistent(size=2, cell=1, margin=0).stamp(torch.full((1, 1, 8, 8), 0.5))[0, 0]
    assert sorted(stamped[:2, :2].flatten().tolist()) == [0, 0, 1, 1]
    for corner in (stamped[:2, -2:], stamped[-2:, :2], stamped[-2:, -2:]):
        assert torch.equal(corner, stamped[:2, :2])
    assert (stamped[2:-2] == 0.5).all()


def test_the_trojan_square_is_textured_and_stays_where_it_is():
    images = noise(2, 3, 16, 16)
    stamped = TrojanSquare(size=5, margin=2).stamp(images)
    changed = (stamped != images).any(0).any(0)
    assert changed.nonzero().min() == 9
    assert changed.nonzero().max() == 13
    assert torch.equal(stamped[0, :, 9:14, 9:14], stamped[1, :, 9:14, 9:14])
    assert stamped[0, :, 9:14, 9:14].flatten().unique().numel() > 50, "many values, unlike BadNets"
    half = TrojanSquare(size=5, margin=2, opacity=0.5).stamp(images)
    assert torch.allclose(half, (images + stamped) / 2, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Blended, {"alpha": 1.5}), (Blended, {"cells": 1}), (WaNet, {"strength": -1.0}), (WaNet, {"grid": 1}),
        (WaNet, {"cross_ratio": -1.0}), (SIG, {"delta": 2.0}), (SIG, {"frequency": 0}), (TrojanSquare, {"size": 0}),
        (TrojanSquare, {"opacity": -0.1}), (LabelConsistent, {"eps": 2.0}), (LabelConsistent, {"steps": 0}),
    ],
)  # fmt: skip
def test_settings_are_checked(cls, settings):
    with pytest.raises(InputError, match=next(iter(settings))):
        cls(**settings)


def test_triggers_must_fit():
    for attack in (TrojanSquare(size=9), LabelConsistent(size=5)):
        with pytest.raises(InputError, match="fit on images of 8×8"):
            attack.stamp(torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def digits():
    domain = smi.load_domain("digits")
    clean = train_classifier(domain.private.train, seed=100)
    accuracy = (
        smi.runtime.compute.predict(clean, domain.private.test.images).argmax(1) == domain.private.test.labels
    ).float()
    return domain, clean, accuracy.mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["badnets", *STATIC])
def test_a_victim_has_the_backdoor(digits, name):
    domain, clean, accuracy = digits
    model, attack = plant(domain.private.train, attacks[name](), surrogate=clean, seed=100)
    found = smi.Evaluator(domain.private.test, attack).measure(model)
    print(f"{name}: ACC {found.acc:.3f} (clean {accuracy:.3f}), ASR {found.asr:.3f}")
    assert found.acc >= accuracy - 0.02
    assert found.asr >= (0.8 if name in ("sig", "label_consistent") else 0.9)
