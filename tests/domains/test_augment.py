import math

import pytest
import torch
from tiny import noise

from smi.domains.augment import gan_augment, jitter, random_affine, random_crop_flip


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def dot(n, at=10, size=20):
    images = torch.zeros(n, 1, size, size)
    images[:, 0, at, at] = 1
    return images


def centre(images):
    """Where the brightness of each image lies ``[N, 2]``: row and column."""
    weight = images[:, 0] / images[:, 0].sum((1, 2), keepdim=True)
    place = torch.arange(images.shape[2], dtype=torch.float32)
    return torch.stack([weight.sum(2) @ place, weight.sum(1) @ place], dim=1)


EVERY = [
    lambda x, g: random_affine(x, g, degrees=20, shift=3, zoom=0.2, flip=True),
    random_crop_flip,
    gan_augment,
]


@pytest.mark.parametrize("augment", EVERY)
@pytest.mark.parametrize("channels", [1, 3])
def test_shape_range_input_and_seed(augment, channels):
    images = noise(6, channels, 16, 16)
    before, state = images.clone(), torch.get_rng_state()
    out = augment(images, rng())
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1 + 1e-6
    assert torch.equal(images, before)
    assert torch.equal(out, augment(images, rng()))
    assert not torch.equal(out, augment(images, rng(1)))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not drawn from


@pytest.mark.parametrize("augment", EVERY)
def test_every_image_gets_its_own_map(augment):
    out = augment(noise(1, 1, 16, 16).expand(8, -1, -1, -1), rng())
    assert len({image.detach().numpy().tobytes() for image in out}) > 4


@pytest.mark.parametrize("augment", EVERY)
def test_differentiable(augment):
    images = noise(8, 1, 16, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(augment(images, rng()).sum(), images)
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_affine_without_any_freedom_is_the_identity():
    images = noise(3, 1, 16, 16)
    assert torch.allclose(random_affine(images, rng()), images, atol=1e-5)


def test_affine_shift_is_in_pixels_and_bounded():
    moved = centre(random_affine(dot(200), rng(), shift=3)) - 10
    assert moved.abs().max() <= 3.01
    assert moved.abs().amax(0).min() > 2.5  # the whole range is used, on both axes


def test_affine_rotation_is_in_degrees_and_bounded():
    images = torch.zeros(200, 1, 33, 33)
    images[:, 0, 4:7, 15:18] = 1  # a spot above the centre
    place = centre(random_affine(images, rng(), degrees=30)) - 16
    angle = torch.atan2(place[:, 1], -place[:, 0]) * 180 / math.pi
    assert angle.abs().max() <= 31
    assert angle.min() < -25
    assert angle.max() > 25
    assert torch.allclose(place.norm(dim=1), torch.tensor(11.0), atol=0.3)


def test_affine_zoom_is_a_share_and_bounded():
    images = torch.zeros(200, 1, 33, 33)
    images[:, 0, 4:7, 15:18] = 1
    height = -(centre(random_affine(images, rng(), zoom=0.2)) - 16)[:, 0] / 11
    assert height.min() >= 1 / 1.2 - 0.02
    assert height.max() <= 1 / 0.8 + 0.03
    assert height.max() - height.min() > 0.3


def test_affine_flip_mirrors_left_and_right_of_about_half():
    images = noise(1, 1, 8, 8).expand(200, -1, -1, -1)
    out = random_affine(images, rng(), flip=True)
    kept = torch.isclose(out, images, atol=1e-5).flatten(1).all(1)
    mirrored = torch.isclose(out, images.flip(3), atol=1e-5).flatten(1).all(1)
    assert (kept ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


def test_crop_shifts_by_whole_pixels():
    out = random_crop_flip(dot(100), rng(), pad=2, flip=False)
    assert ((out == 0) | (out == 1)).all()
    moved = centre(out) - 10
    assert set(moved.flatten().tolist()) == {-2, -1, 0, 1, 2}


def test_crop_fills_with_reflection():
    images = torch.full((50, 3, 8, 8), 0.7)
    assert torch.allclose(random_crop_flip(images, rng()), images)


def test_crop_flip_mirrors_about_half():
    images = noise(1, 1, 8, 8).expand(200, -1, -1, -1)
    mirrored = (random_crop_flip(images, rng(), pad=0) == images.flip(3)).flatten(1).all(1)
    kept = (random_crop_flip(images, rng(), pad=0) == images).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 70 < mirrored.sum() < 130


def test_gan_translation_is_bounded_and_fills_with_black():
    moved = centre(gan_augment(dot(100), rng(), shift=2, hole=0)) - 10
    assert set(moved.flatten().tolist()) == {-2, -1, 0, 1, 2}
    corner = gan_augment(torch.ones(100, 1, 8, 8), rng(), shift=2, hole=0)
    assert ((corner == 0) | (corner == 1)).all()
    assert (corner == 0).any()


def test_gan_hole_is_one_square_on_about_half_of_the_images():
    out = gan_augment(torch.ones(200, 1, 32, 32), rng(), shift=0, hole=10)
    black = (out == 0)[:, 0]
    area = black.sum((1, 2))
    assert 70 < (area > 0).sum() < 130
    assert area.max() <= 100
    for hole in black[area > 0]:
        rows, cols = hole.any(1).sum(), hole.any(0).sum()
        assert hole.sum() == rows * cols  # a filled rectangle, cut off at the border at most
        assert max(rows, cols) <= 10
    assert torch.equal(gan_augment(noise(4, 3, 16, 16), rng(), shift=0, hole=0), noise(4, 3, 16, 16))


def test_vary_keeps_the_range_and_changes_each_image_its_own_way():
    image = torch.zeros(1, 1, 32, 32)
    image[:, :, 8:24, 12:20] = 0.6
    varied = jitter(image.expand(40, 1, 32, 32), torch.Generator().manual_seed(0))
    assert varied.shape == (40, 1, 32, 32)
    assert varied.min() >= 0
    assert varied.max() <= 1
    assert len(varied.flatten(1).unique(dim=0)) == 40
    brightest = varied.flatten(1).amax(1)
    assert 0.6**2 - 0.01 <= brightest.min() < 0.5  # gamma 2 at most
    assert 0.7 < brightest.max() <= 0.6**0.5 + 0.01  # gamma 0.5 at least
    inside = (varied > 0.05).flatten(1).sum(1) / (16 * 8)
    assert inside.min() > 0.6
    assert inside.max() < 2
