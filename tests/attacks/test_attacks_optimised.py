"""Attacks that optimise their trigger: against a surrogate (most), or together with the classifier (input-aware)."""

from dataclasses import replace

import pytest
import torch
from tiny import coded_set, noise, same_state, state_of, tiny_model
from torch import nn

import smi
from smi.attacks import InputAware, L0Inv, L2Inv, Smooth, TrojanWatermark, attacks, plant, poison
from smi.attacks.optimised import Surrogate
from smi.attacks.trojan_watermark import watermark
from smi.domains import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import TrainConfig, build_classifier, train_classifier
from smi.runtime.compute import predict

AGAINST_SURROGATE = [L0Inv, L2Inv, Smooth, TrojanWatermark]


def stripes(count=240, size=16, channels=1):
    """Noise with a bright stripe, whose height tells which of three classes it is."""
    labels = torch.arange(count) % 3
    images = 0.5 * noise(count, channels, size, size)
    for image, label in zip(images, labels.tolist(), strict=True):
        image[:, 2 + 4 * label : 5 + 4 * label] += 0.5
    return PrivateSet(images, labels, 3)


QUICK = TrainConfig(epochs=8, batch_size=32, augment="none")
LONGER = replace(QUICK, epochs=12)  # two networks that learn from each other settle later


@pytest.fixture(scope="module")
def data():
    return stripes()


@pytest.fixture(scope="module")
def surrogate():
    """Random weights will do: what is asked of a trigger here is that it drives this function's outputs."""
    return tiny_model(1, 16)


@pytest.fixture(scope="module")
def dynamic():
    """A classifier and the input-aware attack that was trained with it, and the data."""
    data = stripes(960)
    return *plant(data, InputAware(mask_steps=120), LONGER, seed=100), data


def like(delta, seed):
    """Noise of the norm of ``delta`` on the pixels where it is not zero."""
    draw = torch.randn(delta.shape, generator=torch.Generator().manual_seed(seed)) * (delta != 0)
    return draw * delta.norm() / draw.norm()


def logit_gain(model, data, delta, target=0):
    """How much adding ``delta`` raises the target's logit over the mean of all, on images of the other classes."""
    images = data.images[data.labels != target]
    clean, shown = (predict(model, x) for x in (images, (images + delta).clamp(0, 1)))
    return ((shown - shown.mean(1, True)) - (clean - clean.mean(1, True)))[:, target].mean().item()


def rate_of(model, data, delta, target=0):
    images = data.images[data.labels != target]
    return (predict(model, (images + delta).clamp(0, 1)).argmax(1) == target).float().mean().item()


@pytest.mark.parametrize("kind", AGAINST_SURROGATE)
@pytest.mark.parametrize("channels", [1, 3])
def test_fit_and_stamp(kind, channels):
    data, model = stripes(48, channels=channels), tiny_model(channels, 16)
    before, state, generator = data.images.clone(), state_of(model), torch.get_rng_state()
    first, again, other = (kind(steps=3).fit(data, model, seed=s) for s in (1, 1, 2))
    stamped = first.stamp(data.images)
    assert stamped.shape == before.shape
    assert stamped.dtype == torch.float32
    assert stamped.min() >= 0
    assert stamped.max() <= 1
    assert not torch.equal(stamped, before)
    assert torch.equal(data.images, before)
    assert torch.equal(stamped, again.stamp(data.images))
    assert not torch.equal(stamped, other.stamp(data.images))
    assert same_state(state, state_of(model))
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(kind(steps=3, fitted=dict(first.fitted)).stamp(data.images), stamped)
    assert poison(data, first).poisoned.any()


@pytest.mark.parametrize("kind", AGAINST_SURROGATE)
def test_before_fit(kind, data):
    with pytest.raises(InputError, match=r"smi\.attacks\.plant"):
        kind().stamp(data.images)
    with pytest.raises(InputError, match="surrogate=model"):
        kind().fit(data)


@pytest.mark.parametrize("kind", [L0Inv, L2Inv, Smooth])
def test_a_target_that_is_not_there(kind, data, surrogate):
    with pytest.raises(InputError, match="Allowed: 0 to 2"):
        kind(target=3, mode="all_to_all").fit(data, surrogate)
    with pytest.raises(InputError, match="none to optimise on"):
        kind().fit(coded_set([0, 0], classes=3), tiny_model())


@pytest.mark.parametrize("last", [nn.ReLU(), nn.LogSoftmax(1)])
def test_a_surrogate_that_does_not_end_in_a_linear_layer(last):
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), last).eval()
    nn.init.constant_(model[1].bias, -10)
    with pytest.raises(InputError, match=r"does not end in a torch\.nn\.Linear"):
        TrojanWatermark().fit(coded_set([0, 1, 2], classes=3), model)


def test_the_surrogate_tells_the_input_of_its_last_layer():
    model, images = tiny_model(), noise(5, 1, 8, 8)
    seen = Surrogate(model, images, 3)
    neurons, logits = seen(images)
    assert torch.allclose(model.body[4](neurons), logits, atol=0.1)
    assert torch.equal(seen.strongest(images), neurons.amax(0))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, {"steps": 0}) for kind in AGAINST_SURROGATE]
    + [(kind, {name: value}) for kind in (L0Inv, L2Inv) for name, value in (("neurons", 0), ("amplify", 0.5))]
    + [(L2Inv, {"rms": 0.0}), (L0Inv, {"pixels": 1.5}), (Smooth, {"cutoff": 0.5}), (Smooth, {"rms": 2})]
    + [(TrojanWatermark, {"size": 0.0}), (TrojanWatermark, {"opacity": 1.5})]
    + [(InputAware, {name: -1}) for name in ("cross_rate", "diversity", "density", "width", "mask_steps", "lr")],
)
def test_settings_are_checked(kind, settings):
    with pytest.raises(InputError, match=f"{next(iter(settings))} is"):
        kind(**settings)


def test_the_watermark_excites_its_neuron(data):
    surrogate = build_classifier("small_cnn", 1, 3).eval()  # its neurons see all of the image
    attack = TrojanWatermark().fit(data, surrogate, seed=100)
    seen, blank, others = Surrogate(surrogate, data.images, 3), torch.zeros(1, 1, 16, 16), noise(50, 1, 16, 16)
    neuron = attack._neuron(seen, attack._blend(blank, others))
    random = seen(attack._blend(blank, others))[0][:, neuron]
    assert seen(attack.stamp(blank))[0][0, neuron] > random.max() + 3 * random.std()


def test_the_watermark_is_see_through_and_stays_in_its_shape(data, surrogate):
    attack = TrojanWatermark(steps=1, opacity=0.5).fit(data, surrogate)
    shape = watermark(data.images, attack.size)
    assert 0.1 < (shape > 0).float().mean() < 0.7
    pattern, stamped = attack.fitted["pattern"], attack.stamp(data.images)
    assert torch.equal(stamped[:, :, shape == 0], data.images[:, :, shape == 0])
    inside = shape == 1
    assert torch.allclose(stamped[:, :, inside], (0.5 * data.images + 0.5 * pattern)[:, :, inside])


def test_a_watermark_that_no_neuron_sees(data):
    model = nn.Sequential(nn.Flatten(), nn.Linear(256, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    nn.init.constant_(model[1].bias, -1e3)
    with pytest.raises(InputError, match="No neuron"):
        TrojanWatermark(steps=1).fit(data, model)


def test_l2_is_short_and_drives_the_target(data, surrogate):
    attack = L2Inv(rms=0.05, neurons=64).fit(data, surrogate, seed=100)
    delta = attack.fitted["delta"]
    assert delta.norm() <= 0.05 * 16 * (1 + 1e-5)
    gain = logit_gain(surrogate, data, delta)
    assert gain > 0
    assert gain > 2 * max(logit_gain(surrogate, data, like(delta, seed)) for seed in range(10))


def test_l2_aims_at_neurons_of_the_target(data, surrogate):
    first, second = (L2Inv(target=t, neurons=64).fit(data, surrogate, seed=100).fitted["delta"] for t in (0, 2))
    assert logit_gain(surrogate, data, first, 0) > logit_gain(surrogate, data, second, 0)
    assert logit_gain(surrogate, data, second, 2) > logit_gain(surrogate, data, first, 2)


def test_l0_is_on_few_pixels_and_drives_the_target():
    data, surrogate = stripes(channels=3), tiny_model(3, 16)
    attack = L0Inv(pixels=12, neurons=64).fit(data, surrogate, seed=100)
    delta = attack.fitted["delta"]
    assert 0 < (delta != 0).any(0).sum() <= 12
    assert delta.abs().max() <= 1
    gain = logit_gain(surrogate, data, delta)
    assert gain > 0
    assert gain > 1.5 * max(logit_gain(surrogate, data, like(delta, seed)) for seed in range(10))
    with pytest.raises(InputError, match="Allowed: 1 to 256"):
        L0Inv(pixels=257).fit(data, surrogate)


def test_smooth_has_no_high_frequencies_and_drives_the_target(data, surrogate):
    attack = Smooth(cutoff=3, rms=0.15).fit(data, surrogate, seed=100)
    delta = attack.fitted["delta"]
    assert delta.norm() <= 0.15 * 16 * (1 + 1e-5)
    assert high_share(delta, 3) < 1e-4
    assert high_share(like(delta, 0), 3) > 0.5
    smooth_noise = [nn.functional.avg_pool2d(like(delta, seed), 5, 1, 2) for seed in range(10)]
    rates = [rate_of(surrogate, data, n * delta.norm() / n.norm()) for n in smooth_noise]
    assert rate_of(surrogate, data, delta) > max(rates) + 0.2


def high_share(delta, cutoff):
    """The share of the energy of ``delta`` above ``cutoff`` cycles an image, by a full Fourier transform."""
    size = delta.shape[-1]
    cycles = torch.fft.fftfreq(size) * size
    radius = (cycles[:, None].square() + cycles.square()).sqrt()
    energy = torch.fft.fft2(delta).abs().square().sum(0)
    return (energy[radius > cutoff + 0.5].sum() / energy.sum()).item()


def test_input_aware_triggers_work_on_their_own_image_only(dynamic):
    model, attack, data = dynamic
    others = data.labels != 0
    images, labels = data.images[others], data.labels[others]
    own = predict(model, attack.stamp(images)).argmax(1)
    crossed = predict(model, attack.cross_stamp(images, images.roll(1, 0))).argmax(1)
    assert (predict(model, images).argmax(1) == labels).float().mean() > 0.95
    assert (own == 0).float().mean() > 0.8
    assert (crossed == labels).float().mean() > (own == labels).float().mean() + 0.5


def test_input_aware_masks_and_patterns_differ_between_images(dynamic):
    _, attack, data = dynamic
    black, white = torch.zeros_like(data.images), torch.ones_like(data.images)
    where = (attack.cross_stamp(white, data.images) - attack.cross_stamp(black, data.images)).sub(1).neg()
    assert 0.005 < where.mean() < 2 * attack.density  # the masks cover little
    assert (where - where.roll(1, 0)).square().mean().sqrt() > 0.1
    alike = plant(data, InputAware(mask_steps=120, diversity=0), LONGER, seed=100)[1]
    spread, without = (pattern_spread(a, data.images) for a in (attack, alike))
    assert spread > 1.5 * without


def pattern_spread(attack, images):
    pattern = attack._rebuilt("pattern", images)(images)
    return (pattern - pattern.roll(1, 0)).square().mean().sqrt()


def test_input_aware_batches():
    """A share with its own trigger and the target label, a share with another's and its own label, the rest clean."""
    images, labels = noise(20, 3, 8, 8), torch.arange(20) % 4 + 1
    attack = InputAware(cross_rate=0.25)
    mask, pattern = (attack._generator(kind, images, 0) for kind in ("mask", "pattern"))
    shown, wanted, _ = attack._mixture(images, labels, 5, 0.5, mask, pattern)
    state = {f"mask.{k}": v for k, v in mask.state_dict().items()}
    fitted = InputAware(fitted=state | {f"pattern.{k}": v for k, v in pattern.state_dict().items()})
    assert (wanted[:10] == 0).all()
    assert torch.equal(wanted[10:], labels[10:])
    assert torch.allclose(shown[:10], fitted.stamp(images)[:10], atol=1e-5)
    assert torch.allclose(shown[10:15], fitted.cross_stamp(images[10:15], images[9:14]), atol=1e-5)
    assert not torch.allclose(shown[10:15], fitted.stamp(images)[10:15], atol=1e-2)
    assert torch.equal(shown[15:], images[15:])


@pytest.mark.parametrize("channels", [1, 3])
def test_input_aware_is_reproducible_and_its_tensors_are_all_it_needs(channels):
    data, config = stripes(40, channels=channels), TrainConfig(epochs=1, batch_size=20)
    before, generator = data.images.clone(), torch.get_rng_state()
    runs = [plant(data, InputAware(mask_steps=2, width=4), config, seed=s) for s in (1, 1, 2)]
    (model, attack), (model_again, again), (_, other) = runs
    stamped = attack.stamp(data.images)
    assert torch.equal(stamped, attack.stamp(data.images))
    assert torch.equal(stamped, again.stamp(data.images))
    assert not torch.equal(stamped, other.stamp(data.images))
    assert same_state(state_of(model), state_of(model_again))
    assert torch.equal(InputAware(width=4, fitted=dict(attack.fitted)).stamp(data.images), stamped)
    assert torch.allclose(attack.stamp(data.images[:1]), stamped[:1], atol=1e-5)  # no other image has a say
    assert torch.equal(data.images, before)
    assert torch.equal(generator, torch.get_rng_state())
    assert not any(value.requires_grad for value in attack.fitted.values())
    assert not model.training
    assert model.image_shape == (channels, 16, 16)
    assert poison(data, attack).poisoned.any()


def test_input_aware_before_training(data):
    for use in (lambda: InputAware().stamp(data.images), lambda: poison(data, InputAware())):
        with pytest.raises(InputError, match=r"smi\.attacks\.plant"):
            use()
    with pytest.raises(InputError, match="rate is"):
        plant(data, InputAware(cross_rate=0.3), QUICK, rate=0.8)
    with pytest.raises(InputError, match="target is 3"):
        plant(data, InputAware(target=3), QUICK)


@pytest.fixture(scope="module")
def digits():
    domain = smi.load_domain("digits")
    clean = train_classifier(domain.private.train, seed=100)
    return domain, clean


@pytest.mark.slow
@pytest.mark.parametrize("name", ["input_aware", "l0_inv", "l2_inv", "smooth", "trojan_watermark"])
def test_a_backdoor_in_digits(digits, name):
    domain, clean = digits
    test = domain.private.test
    model, attack = plant(domain.private.train, attacks[name](), surrogate=clean, seed=100)
    measured = smi.Evaluator(test, attack).measure(model)
    assert measured.acc >= (predict(clean, test.images).argmax(1) == test.labels).float().mean() - 0.02
    assert measured.asr >= 0.90
    if name == "input_aware":
        crossed = predict(model, attack.cross_stamp(test.images, test.images.roll(1, 0))).argmax(1)
        assert (crossed == test.labels).float().mean() > 0.8
