from dataclasses import replace

import pytest
import torch

from smi_kernels.errors import InputError
from smi_kernels.noise import PARAMETERS, Draw, draw, factors, families
from smi_kernels.ops.launch import Draws
from smi_kernels.ops.perturb_input.kernel import perturb_input
from smi_kernels.ops.perturb_weight.kernel import perturb_weight

SEED, STD, TENSOR = 2**63 + 0x123456789, 0.0371, 2**32 - 3
SHAPES = [(5, 7), (1, 1), (3, 513), (5, 7, 3, 3), (1, 3, 7, 7), (33, 20, 3, 3), (2, 5, 1, 1), (3, 1, 5)]


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_row(values, theta):
    return values.reshape(-1, *[1] * (theta.ndim - 1))


def noise_of(theta, name, k, *, antithetic=False):
    options = {"seed": SEED, "k": k, "stream": 0, "antithetic": antithetic}
    return draw(families[name], {TENSOR: theta.shape}, **options)[TENSOR]


def expected_weight(theta, noise, scale):
    """``[rows, taps, channels]`` float32, in torch."""
    value = theta + STD * noise
    if scale is not None:
        value = value * by_row(scale, theta)
    return value.flatten(2).transpose(1, 2).contiguous() if theta.ndim > 2 else value[:, None]


def run(theta, *, draws, name="gaussian", first=0, antithetic=False, dtype=torch.float32, **options):
    rows, channels = theta.shape[:2]
    out = torch.full((draws, rows, theta[0, 0].numel(), channels), torch.nan, dtype=dtype)
    which = Draws(first=first, count=draws, seed=SEED, antithetic=antithetic)
    perturb_weight(theta, out, **{"std": STD, "tensor": TENSOR, "family": families[name], "which": which} | options)
    return out


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_weight_is_that_of_torch(name, shape, antithetic):
    theta, scale = random(*shape), random(3, shape[0], seed=1)
    for scales in (None, scale):
        out = run(theta, draws=3, name=name, first=5, scale=scales, antithetic=antithetic)
        for j in range(3):
            noise = noise_of(theta, name, 5 + j, antithetic=antithetic)
            assert torch.equal(out[j], expected_weight(theta, noise, None if scales is None else scales[j]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_one_cast(dtype):
    theta, scale = random(6, 5, 3, 3), random(2, 6, seed=1)
    low, full = (run(theta, draws=2, scale=scale, dtype=d) for d in (dtype, torch.float32))
    assert low.dtype == dtype
    assert torch.equal(low, full.to(dtype))


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_neither_chunks_of_draws_nor_blocks_change_bits(name, antithetic):
    theta = random(9, 13, 3, 3)
    whole = run(theta, draws=5, name=name, antithetic=antithetic)
    pieces = [run(theta, draws=d, first=f, name=name, antithetic=antithetic) for f, d in [(0, 1), (1, 3), (4, 1)]]
    assert torch.equal(torch.cat(pieces), whole)
    for block in (512, 1024, 2048):
        assert torch.equal(run(theta, draws=5, name=name, antithetic=antithetic, block=block), whole)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 3), (33, 20, 3, 3)], ids=str)
def test_rank1(shape):
    theta, draws = random(*shape), 3
    a, b = random(draws, shape[0], seed=1), random(draws, theta[0].numel(), seed=2)
    scale = random(draws, shape[0], seed=3)
    out = run(theta, draws=draws, name="rank1", factors=(a, b), scale=scale, antithetic=True)
    for j in range(draws):
        noise = (a[j][:, None] * b[j]).reshape(shape)
        assert torch.equal(out[j], expected_weight(theta, noise, scale[j]))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 3), (33, 20, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_flipout(name, shape):
    theta, draws = random(*shape), 3
    s_out, s_in = random(draws, shape[0], seed=1).sign(), random(draws, shape[1], seed=2).sign()
    family = replace(families[name], structure="flipout")
    out = run(theta, draws=draws, first=4, family=family, factors=(s_out, s_in), antithetic=True)
    base = noise_of(theta, name, 0)
    for j in range(draws):
        signs = by_row(s_out[j], theta) * s_in[j].reshape(1, -1, *[1] * (theta.ndim - 2))
        assert torch.equal(out[j], expected_weight(theta, base * signs, None))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3, 3)], ids=str)
@pytest.mark.parametrize("name", ["rank1", "flipout"])
def test_structured_families(name, shape):
    """With the factors that the family draws, the weight has the noise that `draw` gives."""
    theta, device = random(*shape), torch.device("cpu")
    which = [Draw(seed=SEED, k=3 + j, stream=PARAMETERS, antithetic=True) for j in range(3)]
    drawn = [factors(families[name], shape, TENSOR, one, device) for one in which]
    stacked = tuple(torch.stack(parts) for parts in zip(*drawn, strict=True))
    out = run(theta, draws=3, first=3, name=name, factors=stacked, antithetic=True)
    for j in range(3):
        assert torch.equal(out[j], expected_weight(theta, noise_of(theta, name, 3 + j, antithetic=True), None))


def expected_input(images, name, k, antithetic):
    options = {"seed": SEED, "k": k, "stream": 1, "antithetic": antithetic}
    delta = draw(families[name], {0: images.shape[1:]}, **options)[0]
    return (images + 0.1 * delta).clamp(0, 1)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("shape", [(3, 3, 5, 7), (1, 1, 16, 16), (2, 3, 16, 16), (5, 2, 23, 29), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "rademacher"])
def test_input_is_that_of_torch(name, shape, antithetic):
    images = random(*shape).sigmoid()
    out = perturb_input(
        images, sigma=0.1, family=families[name], images_per_program=2,
        which=Draws(first=1, count=3, seed=SEED, antithetic=antithetic),
    )  # fmt: skip
    assert torch.equal(out, torch.cat([expected_input(images, name, 1 + j, antithetic) for j in range(3)]))
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_noisy_pixels_are_clamped():
    images = random(2, 1, 9, 9).sigmoid().round()
    out = perturb_input(images, sigma=0.5, family=families["gaussian"], which=Draws(first=0, count=1, seed=1))
    assert out.min() == 0
    assert out.max() == 1
    assert ((out > 0) & (out < 1)).any()


def test_input_chunks_blocks_and_types():
    images = random(5, 3, 9, 11).sigmoid()

    def run_input(first, count, **changes):
        which = Draws(first=first, count=count, seed=SEED, antithetic=True)
        return perturb_input(images, sigma=0.1, family=families["gaussian"], which=which, **changes)

    whole = run_input(0, 5)
    pieces = [run_input(first, count) for first, count in [(0, 1), (1, 2), (3, 2)]]
    assert torch.equal(torch.cat(pieces), whole)
    assert torch.equal(run_input(0, 5, block=2048, images_per_program=1), whole)
    for dtype in (torch.bfloat16, torch.float16):
        assert torch.equal(run_input(0, 5, dtype=dtype), whole.to(dtype))


@pytest.mark.parametrize(
    ("theta", "out", "change", "message"),
    [
        (random(4, 6), torch.empty(1, 4, 1, 5), {}, "out has shape"),
        (random(4, 6), torch.empty(2, 4, 1, 6), {}, "out has shape"),
        (random(4, 6), torch.empty(1, 4, 1, 6, dtype=torch.float64), {}, "out is float64"),
        (random(4, 6).double(), torch.empty(1, 4, 1, 6), {}, "theta is float64"),
        (random(6, 4).T, torch.empty(1, 4, 1, 6), {}, "theta is not contiguous"),
        (random(4, 6), torch.empty(1, 4, 6, 1).transpose(2, 3)[..., ::2], {}, "out is not contiguous"),
        (random(4), torch.empty(1, 4, 1, 1), {}, "theta has shape"),
        (random(4, 6).to("meta"), torch.empty(1, 4, 1, 6), {}, "theta is on meta"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"scale": torch.ones(4)}, "scale has shape"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"scale": torch.ones(1, 4).double()}, "scale is float64"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"tensor": 1 << 32}, "tensor"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"family": families["rank1"]}, "factors"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"family": families["flipout"]}, "factors"),
        (random(4, 6), torch.empty(1, 4, 1, 6), {"factors": (torch.ones(1, 4), torch.ones(1, 6))}, "factors"),
        (
            random(4, 6),
            torch.empty(1, 4, 1, 6),
            {"family": families["flipout"], "factors": (torch.ones(1, 4), torch.ones(1, 5))},
            "right_factor has shape",
        ),
    ],
)
def test_bad_weight_input(theta, out, change, message):
    good = {"std": 1.0, "tensor": 0, "family": families["gaussian"], "which": Draws(first=0, count=1, seed=0)}
    with pytest.raises(InputError, match=message):
        perturb_weight(theta, out, **good | change)


@pytest.mark.parametrize(
    ("images", "change", "message"),
    [
        (random(2, 3, 4), {}, "images have shape"),
        (random(0, 3, 4, 4), {}, "images have shape"),
        (random(2, 3, 4, 4).double(), {}, "images is float64"),
        (random(2, 3, 4, 4).to(memory_format=torch.channels_last), {}, "not contiguous"),
        (random(2, 3, 4, 4), {"dtype": torch.float64}, "dtype"),
        (random(2, 3, 4, 4), {"family": families["rank1"]}, "rank1"),
    ],
)
def test_bad_images(images, change, message):
    good = {"sigma": 0.1, "family": families["gaussian"], "which": Draws(first=0, count=1, seed=0)}
    with pytest.raises(InputError, match=message):
        perturb_input(images, **good | change)
