"""The kernels compiled, on a CUDA device: run with ``pytest -m gpu tests/kernels``. What they compute is checked
without one by `interpreted`; here, that the compiler keeps it, that bits repeat, and that memory stays flat."""

import copy
import types

import pytest
import torch
from operator_samples import SAMPLES, moved, random, run, sample
from torch import nn
from torch.nn import functional as F

from smi_kernels import stability_scores
from smi_kernels.backends import backends, triton as triton_backend
from smi_kernels.noise import families
from smi_kernels.testing import check_divergence, check_epilogue, check_family

pytest.importorskip("triton")

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

HALF = [torch.bfloat16, torch.float16]
NOISE = {"seed_low": 9, "seed_high": 0x80000001}


def both(name, kwargs):
    """The operator's kernel on the device, and its twin on the CPU, both float32 or as stored."""
    found = run(name, moved(kwargs, DEVICE))
    again = run(name, moved(kwargs, DEVICE))
    assert torch.equal(found, again), "not the same bits twice"
    return found.cpu(), run(name, copy.deepcopy(kwargs))


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_samples(name, number):
    found, expected = both(name, sample(name, number))
    if name in ("unit_noise", "perturb_weight", "perturb_input"):
        assert torch.equal(found, expected)
    else:
        tolerance = 1e-4 if found.dtype == torch.float32 else 1e-2
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("name", "number"), SAMPLES)
def test_opcheck(name, number):
    kwargs = moved(sample(name, number), DEVICE)
    torch.library.opcheck(getattr(torch.ops.smi_kernels, name).default, (), kwargs)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_noise_has_the_bits_of_torch(family, antithetic):
    """2²⁰ counters, so that one changed rounding of the compiler shows."""
    index = torch.arange(1 << 20)
    kwargs = {"index": index, "tensor": torch.full_like(index, 2**32 - 1), "family": family, "first": 3, "draws": 2}
    found, expected = both("unit_noise", kwargs | NOISE | {"stream": 1, "antithetic": antithetic})
    assert torch.equal(found.view(torch.int32), expected.view(torch.int32))


WEIGHTS = [(64, 64, 3, 3), (65, 3, 7, 7), (10, 513), (1, 1), (128, 24, 1, 1), (33, 17, 1, 3)]


@pytest.mark.parametrize("shape", WEIGHTS)
@pytest.mark.parametrize("family", ["gaussian", "rademacher", "rank1", "flipout"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_perturbed_weights_have_the_bits_of_torch(shape, family, dtype):
    theta, (rows, channels), taps = random(*shape), shape[:2], random(*shape)[0, 0].numel()
    left = right = None
    if family == "rank1":
        left, right = random(3, rows), random(3, channels * taps, seed=1)
    if family == "flipout":
        left, right = random(3, rows).sign(), random(3, channels, seed=1).sign()
    kwargs = {"theta": theta, "out": torch.zeros(3, rows, taps, channels, dtype=dtype), "std": 0.1, "tensor": 5}
    kwargs |= {"scale": random(3, rows, seed=2), "family": family, "first": 1, "draws": 3, **NOISE, "antithetic": True}
    found, expected = both("perturb_weight", kwargs | {"left": left, "right": right})
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(5, 3, 33, 31), (1, 1, 1, 1), (17, 3, 32, 32), (2, 5, 8, 129)])
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_perturbed_images_have_the_bits_of_torch(shape, family, dtype):
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    kwargs = {"images": images, "sigma": 0.3, "family": family, "first": 1, "draws": 3, **NOISE, "dtype": dtype}
    found, expected = both("perturb_input", kwargs | {"antithetic": True})
    assert torch.equal(found, expected)


def geometry(kernel=3, stride=1, padding=0, dilation=1, groups=1):
    pairs = {"stride": stride, "padding": padding, "dilation": dilation}
    pairs = {key: [value] * 2 if isinstance(value, int) else list(value) for key, value in pairs.items()}
    return ([kernel] * 2 if isinstance(kernel, int) else list(kernel)), {**pairs, "groups": groups}


CONVOLUTIONS = {
    "body": (9, 64, 64, (32, 32), geometry(padding=1)),
    "stem": (9, 3, 64, (33, 31), geometry(kernel=7, stride=2, padding=3)),
    "wide": (3, 256, 130, (7, 7), geometry(padding=1, stride=2)),
    "pointwise": (4, 33, 65, (9, 5), geometry(kernel=1)),
    "groups": (4, 34, 6, (9, 5), geometry(kernel=(1, 3), padding=(0, 1), groups=2)),
    "dilated": (2, 17, 18, (11, 13), geometry(dilation=(2, 1), padding=(2, 0))),
    "one pixel": (1, 16, 1, (1, 1), geometry(kernel=1)),
}


def close(found, expected, dtype):
    """Sums in float32 of the same products, in another order; then one rounding."""
    step = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found.float(), expected.float(), rtol=step, atol=step * expected.float().abs().mean())


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("full", [False, True])
def test_convolutions(name, dtype, full):
    n, channels, outputs, size, (kernel, shape) = CONVOLUTIONS[name]
    x = random(n if full else 2 * n, channels, *size).to(dtype, memory_format=torch.channels_last)
    weight = (random(2, outputs, kernel[0] * kernel[1], channels // shape["groups"]) / channels).to(dtype)
    common = {"x": x, "draws": 2, "epilogue": "silu", "shared": full, "out_dtype": dtype, **shape}
    like = run("perturbed_conv", common | {"weight": weight, "kernel": kernel, "bias": None, "residual": None})
    rest = {"bias": random(2, outputs), "residual": None}
    if full:
        residual = random(*like.shape, seed=1).to(dtype, memory_format=torch.channels_last)
        rest = {"bias": random(2, outputs), "residual": residual}
    found, expected = both("perturbed_conv", common | rest | {"weight": weight, "kernel": kernel})
    assert found.is_contiguous(memory_format=torch.channels_last)
    close(found, expected, dtype)
    theta = random(outputs, channels // shape["groups"], *kernel) / channels
    signs = {"theta": theta, "std": 0.05, "scale": random(2, outputs) if full else None, "tensor": 3, "first": 1}
    found, expected = both("perturbed_conv_signs", common | rest | signs | NOISE | {"antithetic": full})
    close(found, expected, dtype)


@pytest.mark.parametrize(("rows", "features", "outputs"), [(300, 512, 10), (1, 1, 1), (70, 129, 65), (16, 64, 1000)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("full", [False, True])
def test_linear_layers(rows, features, outputs, dtype, full):
    x = random(rows if full else 2 * rows, features).to(dtype)
    weight = (random(2, outputs, features) / features).to(dtype)
    common = {"x": x, "draws": 2, "epilogue": "gelu", "shared": full, "out_dtype": torch.float32}
    rest = {"bias": random(2, outputs) if full else None, "residual": random(2 * rows, outputs) if full else None}
    found, expected = both("perturbed_linear", common | rest | {"weight": weight})
    close(found, expected, torch.float32)
    signs = {"theta": random(outputs, features) / features, "std": 0.05, "tensor": 3, "first": 1, **NOISE}
    signs |= {"scale": random(2, outputs) if full else None, "antithetic": full}
    found, expected = both("perturbed_linear_signs", common | rest | signs)
    close(found, expected, torch.float32)


@pytest.mark.parametrize("divergence", ["kl", "cross_entropy", "total_variation", "margin", "flip"])
@pytest.mark.parametrize(("k", "n", "classes"), [(1, 1, 2), (16, 257, 10), (3, 5, 1003)])
def test_divergences(divergence, k, n, classes):
    clean = 3 * random(n, classes)
    kwargs = {"clean": clean, "perturbed": clean + 0.3 * random(k, n, classes, seed=1), "divergence": divergence}
    kwargs |= {"labels": torch.arange(n) % classes}
    for reduce in ("mean", "max", "none"):
        found, expected = both("score_logits", kwargs | {"reduce": reduce})
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", list(families))
def test_check_family(name):
    check_family(name)


def test_check_divergence_and_epilogue():
    check_divergence("kl")
    check_epilogue("gelu")


class Block(nn.Module):
    def __init__(self, inputs, width, stride):
        super().__init__()
        self.a, self.na = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.b, self.nb = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Sequential()
        if stride > 1 or inputs != width:
            self.skip = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return F.relu(self.nb(self.b(F.relu(self.na(self.a(x))))) + self.skip(x))


class ResNet(nn.Module):
    """ResNet-18 for images of 32 × 32, of any width."""

    def __init__(self, width=64, blocks=2):
        super().__init__()
        layers, inputs = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()], width
        for stage in range(4):
            for block in range(blocks):
                layers.append(Block(inputs, width << stage, 2 if stage and not block else 1))
                inputs = width << stage
        self.body, self.head = nn.Sequential(*layers), nn.Linear(inputs, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


WIDTH, N = 64, 33


@pytest.fixture(scope="module")
def resnet():
    """With running statistics of its own values, as after training."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ResNet(WIDTH).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            model(torch.rand(16, 3, 32, 32))
    return model.eval().to(DEVICE)


@pytest.fixture(scope="module")
def images():
    return torch.rand(N, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)


OPTIONS = {"k": 8, "sigma_x": 0.05, "sigma_w": 0.05, "seed": (1 << 63) + 9}
SETTINGS = [(family, x, w) for family in ("gaussian", "rademacher", "rank1", "flipout") for x, w in ((0.05, 0.05),)]
SETTINGS += [("gaussian", 0.0, 0.05), ("rademacher", 0.0, 0.05), ("gaussian", 0.05, 0.0)]


@pytest.mark.parametrize(("family", "sigma_x", "sigma_w"), SETTINGS)
def test_scores_of_a_resnet(resnet, images, family, sigma_x, sigma_w):
    options = OPTIONS | {"family": family, "sigma_x": sigma_x, "sigma_w": sigma_w}
    exact = stability_scores(resnet, images, **options, dtype="float64", backend="reference")
    single = stability_scores(resnet, images, **options, dtype="float32", backend="triton")
    assert ((single - exact).abs() <= 1e-3 * exact + 1e-6).all()
    for dtype in ("bfloat16", "float16"):
        low, other = (
            stability_scores(resnet, images, **options, dtype=dtype, backend=backend).double()
            for backend in ("triton", "torch")
        )
        assert abs(low.mean() - exact.mean()) <= 2e-2 * exact.mean() + 1e-5
        # How large the error of 16 bits is depends on the model: no larger than torch makes it, but for luck.
        assert (low - exact).abs().mean() <= 1.5 * (other - exact).abs().mean() + 1e-5


def test_it_is_what_auto_chooses(resnet, images, monkeypatch):
    chosen = counted(monkeypatch)
    stability_scores(resnet, images, **OPTIONS)
    assert chosen == [8]


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_bits_however_the_work_is_cut(resnet, images, family, dtype, monkeypatch):
    options = OPTIONS | {"family": family, "dtype": dtype, "antithetic": True, "backend": "triton"}
    # The library may sum in another order for another batch.
    monkeypatch.setattr(triton_backend, "prefers_library", lambda *a: False)
    whole = stability_scores(resnet, images, **options)
    assert torch.equal(stability_scores(resnet, images, **options), whole)
    assert torch.equal(stability_scores(resnet, images.contiguous(memory_format=torch.channels_last), **options), whole)
    monkeypatch.setattr(triton_backend, "SCRATCH", 1 << 20)
    monkeypatch.setattr(triton_backend, "ACTIVATIONS", 64 << 20)
    assert torch.equal(stability_scores(resnet, images, **options), whole)


def test_the_library_agrees(resnet, images, monkeypatch):
    options = OPTIONS | {"dtype": "float32", "backend": "triton"}
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    results = []
    for choice in (False, True):
        monkeypatch.setattr(triton_backend, "prefers_library", lambda *a, choice=choice: choice)
        results.append(stability_scores(resnet, images, **options))
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-6)


def peak(model, images, k, **options):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    stability_scores(model, images, **OPTIONS | {"k": k, "backend": "triton"} | options)
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "flipout"])
def test_memory_does_not_grow_with_k(resnet, images, family, monkeypatch):
    """Draws are run in groups; with room for 8 of them, 64 take no more than 16: two groups, because in the second the
    scratch has its full size from the start."""
    monkeypatch.setattr(triton_backend, "ACTIVATIONS", 8 * 4 * 3 * len(images) * 32 * 32 * 64)
    few, many = (peak(resnet, images, k, family=family) for k in (16, 64))
    assert many <= 1.05 * few


def test_gradient(resnet, images):
    gradients = []
    for backend in ("triton", "torch"):
        x = images[:5].clone().requires_grad_()
        scores = stability_scores(resnet, x, **OPTIONS, dtype="float32", backend=backend)
        (scores * torch.arange(1.0, 6.0, device=DEVICE)).sum().backward()
        gradients.append(x.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-3 * gradients[0].abs().mean().item())


def counted(monkeypatch):
    """Number of draws of each call of the Triton backend, from now on."""
    calls = []
    spied = type(backends["triton"])(
        scores=lambda model, request: calls.append(request.k) or triton_backend.scores(model, request),
        supports=triton_backend.supports,
        priority=backends["triton"].priority,
    )
    monkeypatch.setitem(backends._items, "triton", spied)
    return calls


def test_inversion_reaches_the_kernels(resnet, monkeypatch):
    """`smi` gives images on the device to `stability_scores`, and their gradient reaches the latents."""
    from smi.inversion.base import Task
    from smi.inversion.stabilized import Stabilized
    from smi.runtime.compute import fast, frozen

    calls = counted(monkeypatch)
    net = nn.Sequential(nn.Linear(6, 3 * 32 * 32), nn.Sigmoid(), nn.Unflatten(1, (3, 32, 32))).to(DEVICE)
    prior = types.SimpleNamespace(latent_dim=6, image_shape=(3, 32, 32), generate=net, criticise=lambda images: None)
    model = frozen(resnet)
    with fast(model) as runner:
        labels = torch.tensor([1, 2, 3], device=DEVICE)
        task = Task(model, runner, prior, labels, torch.Generator().manual_seed(0), progress=1.0)
        z = random(3, 6).to(DEVICE).requires_grad_()
        method = Stabilized(inner="random", k=4, warmup=0.0)
        method.objective(method.render(z, task), z, task).backward()
    assert calls == [4, 4]  # noise on the image, and on the parameters
    assert z.grad.isfinite().all()
    assert (z.grad != 0).any()
