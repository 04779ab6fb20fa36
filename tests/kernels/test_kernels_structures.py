"""rank1 and flipout: their noise against its definition, and one product for all draws against a loop."""

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from kernel_reference import numpy_noise
from torch import nn

from smi_kernels import stability_scores
from smi_kernels.backends import shared
from smi_kernels.noise import PARAMETERS, SIGNS, draw, families

SHAPES = [(), (7,), (5, 3), (6, 4, 3, 2)]
JOINT = {"k": 6, "sigma_x": 0.1, "sigma_w": 0.05}


def one(name, shape, *, tensor=2, seed=2**40 + 1, k=3, antithetic=False):
    return draw(families[name], {tensor: shape}, seed=seed, k=k, stream=PARAMETERS, antithetic=antithetic)[tensor]


def numbers(family, count, k, stream):
    return numpy_noise(family, (count,), seed=2**40 + 1, tensor=2, k=k, stream=stream).float()


@pytest.mark.parametrize("shape", SHAPES)
def test_rank1_is_an_outer_product_of_gaussians(shape):
    rows, columns = (shape or (1,))[0], torch.Size(shape[1:]).numel()
    start = -(-rows // 4) * 4
    values = numbers("gaussian", start + columns, 3, PARAMETERS)
    expected = values[:rows] if len(shape) < 2 else values[:rows, None] * values[start:]
    torch.testing.assert_close(one("rank1", shape), expected.reshape(shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_flipout_changes_the_signs_of_one_draw(shape):
    rows = (shape or (1,))[0]
    base = numbers("gaussian", torch.Size(shape).numel(), 0, PARAMETERS).reshape(shape)
    signs = numbers("rademacher", 128 + (shape[1] if len(shape) > 1 else 0), 3, PARAMETERS + SIGNS)
    expected = base * signs[:rows].reshape(-1, *[1] * (len(shape) - 1)) if shape else base * signs[0]
    if len(shape) > 1:
        expected = expected * signs[128:].reshape(-1, *[1] * (len(shape) - 2))
    torch.testing.assert_close(one("flipout", shape), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["rank1", "flipout"])
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), tensor=st.integers(0, 2**32 - 1))
def test_moments_over_draws(name, seed, tensor):
    """Mean 0, variance 1 and no correlation of two elements; flipout's B is shared, so its mean is over the signs."""
    draws = torch.stack([one(name, (3, 5), seed=seed, tensor=tensor, k=k) for k in range(2000)]).double()
    scale = one("flipout", (3, 5), seed=seed, tensor=tensor, k=0).double().abs() if name == "flipout" else 1.0
    assert ((draws / scale).mean(0).abs() < 6 * 2000**-0.5).all()
    # Products of two normals have a fourth moment of 9, signs of 1.
    assert (((draws / scale) ** 2).mean(0) - 1).abs().max() < 6 * (8 / 2000) ** 0.5
    assert ((draws / scale)[:, 0, 1] * (draws / scale)[:, 2, 4]).mean().abs() < 6 * (9 / 2000) ** 0.5


def test_flipouts_base_has_unit_variance():
    noise = one("flipout", (400, 1000)).double()
    assert noise.mean().abs() < 5 / 400_000**0.5
    assert (noise.var() - 1).abs() < 5 * (2 / 400_000) ** 0.5


@pytest.mark.parametrize("name", ["rank1", "flipout"])
def test_antithetic_draws_are_opposite(name):
    assert torch.equal(one(name, (5, 4), k=4, antithetic=True), -one(name, (5, 4), k=5, antithetic=True))
    assert not torch.equal(one(name, (5, 4), k=4, antithetic=True), one(name, (5, 4), k=6, antithetic=True))


class Plain(nn.Module):
    """Convolutions with bias and with BatchNorm (one γ is 0), a residual, two linear layers, one with BatchNorm."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.hidden, self.flat = nn.Linear(6, 7), nn.BatchNorm1d(7)
        self.head = nn.Linear(7, 4, bias=False)

    def forward(self, x):
        h = self.first(x).relu()
        h = (self.norm(self.second(h)) + h).relu().mean((2, 3))
        return self.head(self.flat(self.hidden(h)).relu())


@pytest.fixture
def plain():
    torch.manual_seed(3)
    model = Plain().eval()
    with torch.no_grad():
        for norm in (model.norm, model.flat):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.weight.uniform_(0.5, 2)
            norm.bias.normal_()
        model.norm.weight[2] = 0
    return model


@pytest.mark.parametrize("name", ["rank1", "flipout"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("parameters", [None, ["second", "norm", "head"], ["norm"]])
def test_one_product_for_all_draws_equals_a_loop(plain, name, antithetic, parameters, monkeypatch):
    images = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    options = JOINT | {"family": name, "antithetic": antithetic, "parameters": parameters, "reduce": "none"}
    used = []
    run = shared.run_layer
    monkeypatch.setattr(shared, "run_layer", lambda *a: used.append(True) or run(*a))
    ours = stability_scores(plain, images, **options, dtype="float64")
    assert used
    exact = stability_scores(plain, images, **options, dtype="float64", backend="reference")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-12)
    low = stability_scores(plain, images, **options, dtype="float32").double()
    assert ((low - exact).abs() <= 1e-3 * exact + 1e-6).all()


@pytest.mark.parametrize("name", ["rank1", "flipout"])
@pytest.mark.parametrize("together", [False, True])
def test_bfloat16_error(cnn, images, name, together, monkeypatch):
    monkeypatch.setattr("smi_kernels.backends.together.VALUES", 2**40 if together else 1)
    options = JOINT | {"k": 16, "family": name}
    exact = stability_scores(cnn, images, **options, dtype="float64", backend="reference")
    low = stability_scores(cnn, images, **options, dtype="bfloat16").double()
    assert ((low - exact).abs() <= 5e-2 * exact + 1e-5).all()
    assert abs(low.mean() - exact.mean()) <= 1e-2 * exact.mean()


@pytest.mark.parametrize("name", ["rank1", "flipout"])
def test_groups_of_draws_change_nothing(plain, name, monkeypatch):
    images = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    options = JOINT | {"family": name, "reduce": "none", "dtype": "float64"}
    whole = stability_scores(plain, images, **options)
    for draws in (1, 2, 4):
        monkeypatch.setattr("smi_kernels.backends.together.GROUP", draws)
        few = stability_scores(plain, images, **options)
        torch.testing.assert_close(few, whole, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["rank1", "flipout"])
def test_labels_reach_every_draw(plain, name, monkeypatch):
    images, labels = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 3])
    options = JOINT | {"family": name, "divergence": "margin", "dtype": "float64", "reduce": "max"}
    exact = stability_scores(plain, images, labels, **options, backend="reference")
    torch.testing.assert_close(stability_scores(plain, images, labels, **options), exact, rtol=1e-6, atol=1e-9)


def test_grouped_convolutions_and_gradients_are_left_to_the_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    images = torch.rand(2, 2, 4, 4)
    for name in ("rank1", "flipout"):
        options = JOINT | {"family": name, "dtype": "float64"}
        exact = stability_scores(model, images, **options, backend="reference")
        torch.testing.assert_close(stability_scores(model, images, **options), exact, rtol=1e-6, atol=1e-12)
        x = images.clone().requires_grad_()
        dense = copy.deepcopy(model)
        dense[0] = nn.Conv2d(2, 4, 3).eval()
        stability_scores(dense, x, **options).sum().backward()
        y = images.clone().requires_grad_()
        stability_scores(dense, y, **options, backend="reference").sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-10)
