from itertools import pairwise

import pytest
import torch
from tiny import noise, same_state, state_of
from torch import nn
from torch.nn import functional as F

from smi.domains import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import (
    AUGMENTATIONS,
    Classifier,
    PreActivationBlock,
    TrainConfig,
    architectures,
    build_classifier,
    train_classifier,
)


def bright_or_dark(n=48):
    """Two classes that a few steps tell apart: bright above or bright below."""
    labels = torch.arange(n) % 2
    images = noise(n, 1, 32, 32) * 0.3
    images[labels == 0, :, :16] += 0.6
    images[labels == 1, :, 16:] += 0.6
    return PrivateSet(images, labels, 2)


QUICK = TrainConfig(epochs=8, batch_size=16, lr=0.05, augment="none")


@pytest.mark.parametrize("arch", sorted(architectures))
@pytest.mark.parametrize("channels", [1, 3])
def test_images_to_logits(arch, channels):
    model = build_classifier(arch, channels, 7).eval()
    images = noise(2, channels, 32, 32)
    logits = model(images)
    assert logits.shape == (2, 7)
    assert torch.isfinite(logits).all()
    assert not torch.allclose(logits[0], logits[1])


@pytest.mark.parametrize(
    ("arch", "millions"),
    [("small_cnn", 0.13), ("small_vgg", 0.29), ("elu_vgg", 0.31), ("small_preact", 0.68), ("resnet18", 11.2)],
)
def test_an_architecture_has_the_size_it_says(arch, millions):
    count = sum(p.numel() for p in build_classifier(arch, 3, 10).parameters())
    assert count / 1e6 == pytest.approx(millions, rel=0.03)


def test_nothing_but_an_addition_is_between_a_pre_activation_block_and_the_next():
    """With its last convolution at zero a block is the identity, negative values too: no ReLU after the sum."""
    block = PreActivationBlock(4, 4, 1).eval()
    with torch.no_grad():
        block.second[2].weight.zero_()
    x = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x)


def test_the_elu_vgg_is_the_network_of_its_source():
    """Shapes of the published checkpoints: six convolutions of 32 to 128 channels, a head from 2,048."""
    shapes = [tuple(p.shape) for p in build_classifier("elu_vgg", 3, 10).parameters() if p.ndim > 1]
    widths = [3, 32, 32, 64, 64, 128, 128]
    assert shapes == [*((o, i, 3, 3) for i, o in pairwise(widths)), (10, 2048)]


def test_normalisation_lives_inside():
    model = Classifier(nn.Identity(), mean=[0.5, 0.4, 0.3], std=[0.1, 0.2, 0.5])
    out = model(torch.full((1, 3, 2, 2), 0.6))
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([1.0, 1.0, 0.6]))


def test_channels_must_match():
    with pytest.raises(InputError, match="1 channels, the classifier 3"):
        build_classifier("small_cnn", 3, 2)(noise(1, 1, 32, 32))


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5, 0.5]), ([0.5], [0.0])])
def test_bad_normalisation(mean, std):
    with pytest.raises(InputError, match="std"):
        Classifier(nn.Identity(), mean, std)


def test_initial_weights_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    first, again, other = (build_classifier("small_cnn", 1, 2, seed=s) for s in (1, 1, 2))
    assert same_state(state_of(first), state_of(again))
    assert not same_state(state_of(first), state_of(other))
    assert torch.equal(torch.get_rng_state(), state)


def test_training_lowers_the_loss_and_learns():
    data = bright_or_dark()
    with torch.no_grad():
        before = F.cross_entropy(build_classifier("small_cnn", 1, 2).eval()(data.images), data.labels)
    model = train_classifier(data, QUICK)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        logits = model(data.images)
    assert F.cross_entropy(logits, data.labels) < before / 2
    assert (logits.argmax(1) == data.labels).float().mean() > 0.9


def test_the_same_seed_gives_the_same_weights_and_touches_nothing_else():
    data = bright_or_dark()
    images, state = data.images.clone(), torch.get_rng_state()
    config = TrainConfig(epochs=1, batch_size=16)
    torch.manual_seed(123)
    first = train_classifier(data, config, seed=5)
    torch.manual_seed(456)
    between = torch.get_rng_state()
    again, other = train_classifier(data, config, seed=5), train_classifier(data, config, seed=6)
    assert torch.equal(torch.get_rng_state(), between)
    torch.set_rng_state(state)
    assert same_state(state_of(first), state_of(again))
    assert not same_state(state_of(first), state_of(other))
    assert torch.equal(data.images, images)


@pytest.mark.parametrize("augment", sorted(AUGMENTATIONS))
def test_every_augmentation_keeps_the_shape(augment):
    images = noise(4, 3, 32, 32)
    out = AUGMENTATIONS[augment](images, torch.Generator().manual_seed(0))
    assert out.shape == images.shape
    assert torch.equal(out, images) == (augment == "none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "small_cn"}, "Did you mean 'small_cnn'"),
        ({"augment": "mixup"}, "affine, crop"),
        ({"epochs": 0}, "epochs"),
        ({"batch_size": 1}, "batch_size"),
        ({"lr": float("nan")}, "lr"),
        ({"weight_decay": -1.0}, "weight_decay"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**settings)


def test_a_pooling_model_refuses_a_prior_of_another_size():
    from tiny import TinyPrior

    import smi

    data = PrivateSet(torch.rand(12, 1, 16, 16), torch.arange(12) % 3, 3)
    model = smi.train_classifier(data, smi.TrainConfig(epochs=1, batch_size=6, augment="none"))
    with pytest.raises(smi.InputError, match="trained on images of shape"):
        smi.invert(model, TinyPrior(size=8), smi.Latent(steps=1), per_class=1)
