import copy

import pytest
import torch
from kernel_reference import SmallCNN, naive_scores, numpy_noise
from torch import nn
from torch.nn import functional as F

from smi_kernels import stability_scores
from smi_kernels.backends import backends
from smi_kernels.divergences import divergences

JOINT = {"k": 8, "sigma_x": 0.1, "sigma_w": 0.05}
SETTINGS = [JOINT, {"k": 8, "sigma_x": 0.05, "sigma_w": 0}, {"k": 8, "sigma_x": 0.0, "sigma_w": 0.1}]


@pytest.mark.parametrize("divergence", list(divergences))
@pytest.mark.parametrize("setting", SETTINGS)
def test_float64_agrees_with_a_naive_loop(cnn, images, labels, setting, divergence):
    ours = stability_scores(
        cnn, images, labels, **setting, divergence=divergence, reduce="none", dtype="float64", seed=9
    )
    theirs = naive_scores(cnn, images, labels, **setting, divergence=divergence, seed=9)
    assert ours.dtype == torch.float64
    # The noise of the naive loop is float64 throughout, ours is rounded to float32.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("family", "input_family"), [("gaussian", "rademacher"), ("rademacher", "gaussian")])
@pytest.mark.parametrize("antithetic", [False, True])
def test_families_and_antithetic_agree_with_a_naive_loop(cnn, images, family, input_family, antithetic):
    options = JOINT | {"family": family, "input_family": input_family, "antithetic": antithetic}
    ours = stability_scores(cnn, images, **options, dtype="float64", reduce="none")
    torch.testing.assert_close(ours, naive_scores(cnn, images, **options), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("setting", SETTINGS)
def test_float32_error(cnn, images, setting):
    exact = naive_scores(cnn, images, **setting).mean(1)
    ours = stability_scores(cnn, images, **setting, dtype="float32")
    assert ours.dtype == torch.float32
    assert ((ours - exact).abs() <= 1e-3 * exact + 1e-6).all()


@pytest.mark.parametrize("setting", SETTINGS)
def test_bfloat16_error(cnn, images, setting):
    setting = setting | {"k": 16}
    exact = naive_scores(cnn, images, **setting).mean(1)
    ours = stability_scores(cnn, images, **setting, dtype="bfloat16").double()
    assert ((ours - exact).abs() <= 5e-2 * exact + 1e-5).all()
    assert abs(ours.mean() - exact.mean()) <= 1e-2 * exact.mean()
    ranks = torch.stack([ours.argsort().argsort(), exact.argsort().argsort()]).double()
    assert torch.corrcoef(ranks)[0, 1] >= 0.99


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float64])
def test_same_seed_same_bits(cnn, images, dtype):
    first, second, other = (
        stability_scores(cnn, images, **JOINT, dtype=dtype, seed=seed) for seed in (2**40, 2**40, 2**40 + 1)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_batch_order_composition_and_chunk_do_not_matter(cnn, images):
    options = JOINT | {"dtype": "float64", "reduce": "none"}
    whole = stability_scores(cnn, images, **options)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    close = {"rtol": 1e-9, "atol": 1e-15}
    torch.testing.assert_close(stability_scores(cnn, images[order], **options), whole[order], **close)
    torch.testing.assert_close(stability_scores(cnn, images[3:4], **options), whole[3:4], **close)
    for chunk in (1, 5, 1000):
        torch.testing.assert_close(stability_scores(cnn, images, **options, chunk=chunk), whole, **close)


def test_more_draws_start_with_the_same_ones(cnn, images):
    options = {"sigma_x": 0.1, "sigma_w": 0.05, "dtype": "float32", "reduce": "none"}
    few, many = (stability_scores(cnn, images, k=k, **options) for k in (3, 5))
    assert torch.equal(few, many[:, :3])


def test_reductions(cnn, images):
    draws, mean, worst = (stability_scores(cnn, images, **JOINT, reduce=r) for r in ("none", "mean", "max"))
    assert draws.shape == (len(images), 8)
    torch.testing.assert_close(mean, draws.mean(1))
    assert torch.equal(worst, draws.max(1).values)


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_no_noise_gives_zero(cnn, images, dtype):
    scores = stability_scores(cnn, images, k=2, sigma_x=0, sigma_w=0, dtype=dtype)
    assert torch.equal(scores, torch.zeros(len(images)))


def test_no_noise_gives_plain_cross_entropy(cnn, images, labels):
    options = {"divergence": "cross_entropy", "dtype": "float32"}
    scores = stability_scores(cnn, images, labels, k=2, sigma_x=0, sigma_w=0, **options)
    with torch.no_grad():
        torch.testing.assert_close(scores, F.cross_entropy(cnn(images), labels, reduction="none"))


class Counter(SmallCNN):
    """Writes to a buffer on each call, as a careless model may."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_the_model_is_unchanged(dtype):
    model = Counter().eval()
    before = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    images = torch.rand(4, 1, 8, 8, requires_grad=True)
    stability_scores(model, images, **JOINT, dtype=dtype).sum().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert all(p.grad is None and p.dtype == torch.float32 for p in parameters)
    assert not any(m.training for m in model.modules())


def test_noncontiguous_images(cnn, images):
    options = JOINT | {"dtype": "float32"}
    expected = stability_scores(cnn, images, **options)
    strided = torch.empty(16, 16, 1, 2 * len(images))[..., ::2].permute(3, 2, 0, 1)
    strided.copy_(images)
    assert not strided.is_contiguous()
    assert torch.equal(stability_scores(cnn, strided, **options), expected)


@pytest.mark.parametrize(
    ("wanted", "selected"),
    [
        ("head", {"head.weight", "head.bias"}),
        (["block", "stem.0.weight"], {"block.conv.weight", "block.norm.weight", "block.norm.bias", "stem.0.weight"}),
        (lambda name: name.endswith("conv.weight"), {"block.conv.weight"}),
    ],
)
def test_parameter_filter(cnn, images, wanted, selected):
    """Equal to a naive loop in which the other tensors are buffers in effect: their noise is taken away again."""
    ours = stability_scores(cnn, images, k=1, sigma_x=0, sigma_w=0.1, dtype="float64", parameters=wanted)
    noisy = copy.deepcopy(cnn).double()
    with torch.no_grad():
        for tensor, (name, p) in enumerate(noisy.named_parameters()):
            if name in selected:
                noise = numpy_noise("gaussian", p.shape, seed=0, tensor=tensor, k=0, stream=0)
                p += 0.1 * p.square().mean().sqrt() * noise
        p, q = (m(images.double()).log_softmax(1) for m in (copy.deepcopy(cnn).double(), noisy))
    torch.testing.assert_close(ours, (p.exp() * (p - q)).sum(1), rtol=1e-4, atol=1e-9)


def test_tied_parameters_share_their_noise():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.first(x.flatten(1)) - self.second(x.flatten(1)) + x.flatten(1)

    model = Tied().eval()
    with torch.no_grad():
        model.second.bias.copy_(model.first.bias)
    only_weight = stability_scores(
        model, torch.rand(3, 3, 2, 2), k=4, sigma_x=0, sigma_w=0.5, dtype="float64", parameters="first.weight"
    )
    assert (only_weight < 1e-20).all()


def linear_model(classes=4, pixels=9):
    model = nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double().eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(classes, pixels, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("input_family", ["gaussian", "rademacher"])
def test_closed_form_for_a_linear_model(input_family):
    """E KL = ½ σ² tr(Wᵀ F W) + O(σ⁴), with the Fisher matrix F = diag(p) − ppᵀ of a softmax."""
    model, sigma, k = linear_model(), 1e-3, 4000
    images = 0.2 + 0.6 * torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = stability_scores(model, images, k=k, sigma_x=sigma, sigma_w=0, input_family=input_family)
    p = model(images).softmax(1).detach()
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    weight = model[1].weight.detach()
    expected = 0.5 * sigma**2 * torch.einsum("ip,nij,jp->n", weight, fisher, weight)
    # A quadratic form in normals has a relative variance of at most 2.
    assert ((scores / expected - 1).abs() < 5 * (2 / k) ** 0.5).all()


def test_closed_form_of_parameter_noise():
    """E KL over noise on the bias of a linear model: ½ (σ_w ‖b‖)² / C · tr F."""
    model, sigma, k = linear_model(), 1e-3, 4000
    images = torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    scores = stability_scores(model, images, k=k, sigma_x=0, sigma_w=sigma, parameters=["1.bias"])
    p = model(images).softmax(1).detach()
    variance = sigma**2 * model[1].bias.detach().square().mean()
    expected = 0.5 * variance * (1 - p.square().sum(1))
    assert ((scores / expected - 1).abs() < 5 * (2 / k) ** 0.5).all()


def test_antithetic_pairs_cancel_the_margin_of_a_linear_model():
    """The margin between two classes is linear in the input, so the mean over a pair is 0 to rounding."""
    model = linear_model(classes=2)
    images = 0.4 + 0.2 * torch.rand(3, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    labels = torch.tensor([0, 1, 0])
    options = {"k": 4, "sigma_x": 0.01, "sigma_w": 0, "divergence": "margin"}
    paired = stability_scores(model, images, labels, **options, antithetic=True)
    free = stability_scores(model, images, labels, **options)
    assert (paired.abs() < 1e-12).all()
    assert (free.abs() > 1e-4).all()


def test_perturbed_images_are_clamped():
    class LargestPixel(nn.Module):
        def forward(self, x):
            assert x.min() >= 0
            assert x.max() <= 1
            return torch.stack([x.amax((1, 2, 3)), x.amin((1, 2, 3))], dim=1)

    scores = stability_scores(LargestPixel().eval(), torch.full((2, 1, 4, 4), 0.5), k=4, sigma_x=5.0, sigma_w=0.1)
    assert (scores > 0).all()


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy", "total_variation", "margin"])
def test_gradient_in_images(divergence):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    model = model.double().eval()
    images = (0.3 + 0.4 * torch.rand(2, 2, 4, 4, dtype=torch.float64)).requires_grad_()
    options = {"k": 2, "sigma_x": 0.02, "sigma_w": 0.2, "divergence": divergence}

    def score(x):
        return stability_scores(model, x, torch.tensor([0, 2]), **options)

    assert torch.autograd.gradcheck(score, (images,))


def test_float32_and_bfloat16_gradients_agree(cnn, images):
    gradients = []
    for dtype in ("float32", "bfloat16"):
        x = images.clone().requires_grad_()
        stability_scores(cnn, x, **JOINT, dtype=dtype).sum().backward()
        gradients.append(x.grad.flatten())
    assert F.cosine_similarity(*gradients, dim=0) > 0.99


def test_no_graph_unless_asked_for(cnn, images):
    assert not stability_scores(cnn, images, **JOINT).requires_grad
    with torch.no_grad():
        assert not stability_scores(cnn, images.clone().requires_grad_(), **JOINT).requires_grad


def test_auto_dtype(cnn, images, monkeypatch):
    options = JOINT | {"k": 2}
    for has, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("smi_kernels.precision.has_bfloat16", lambda device, has=has: has)
        expected = stability_scores(cnn, images, **options, dtype=name)
        assert torch.equal(stability_scores(cnn, images, **options), expected)
    double = copy.deepcopy(cnn).double()
    assert stability_scores(double, images, **options).dtype == torch.float64


def test_a_callers_autocast_does_not_leak_in(cnn, images):
    expected = stability_scores(cnn, images, **JOINT, dtype="float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stability_scores(cnn, images, **JOINT, dtype="float32"), expected)


def test_bfloat16_logits_are_float32(monkeypatch, cnn, images):
    seen = []
    for module in ("torch", "together"):
        monkeypatch.setattr(f"smi_kernels.backends.{module}.check_logits", lambda logits, *a, **b: seen.append(logits))
    stability_scores(cnn, images, **JOINT, dtype="bfloat16")
    assert seen
    assert all(z.dtype == torch.float32 for z in seen)
    assert any((z != z.bfloat16()).any() for z in seen)


def test_backends_are_chosen_by_support_and_priority(cnn, images, monkeypatch):
    def fixed(value, priority, supported):
        return type(backends["torch"])(
            scores=lambda model, request: torch.full((len(request.images), request.k), value),
            supports=lambda model, request: supported,
            priority=priority,
        )

    plugins = {"fast": fixed(1.0, 20, False), "good": fixed(2.0, 10, True)}
    monkeypatch.setattr(backends, "_items", backends._items | plugins)
    assert (stability_scores(cnn, images, **JOINT) == 2).all()
    assert (stability_scores(cnn, images, **JOINT, backend="torch") != 2).all()
    monkeypatch.setenv("SMI_KERNELS_BACKEND", "torch")
    assert (stability_scores(cnn, images, **JOINT) != 2).all()
    assert (stability_scores(cnn, images, **JOINT, backend="good") == 2).all()
    with pytest.raises(ValueError, match="'fast' cannot score"):
        stability_scores(cnn, images, **JOINT, backend="fast")
