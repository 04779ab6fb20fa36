"""Scores of the Triton backend end to end, in Triton's interpreter: run with TRITON_INTERPRET=1."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smi_kernels import Epilogue, InputError, stability_scores
from smi_kernels.backends import backends, torch as torch_backend, triton as triton_backend
from smi_kernels.divergences import Divergence, divergences
from smi_kernels.epilogues import epilogues
from smi_kernels.graph.plan import plan_of
from smi_kernels.noise import Family, families
from smi_kernels.ops.perturbed_conv import kernel as kernels

IMAGES = 0.01 + 0.98 * torch.rand(3, 2, 7, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 4, 2])
JOINT = {"k": 2, "sigma_x": 0.05, "sigma_w": 0.1, "seed": (1 << 63) + (1 << 31) + 9}


class Small(nn.Module):
    """A residual block, BatchNorm, a stride, groups, biases, fused and functional activations, and a linear head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        self.body, self.norm = nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.grouped = nn.Conv2d(6, 10, 3, stride=2, groups=2)
        self.last = nn.Conv2d(10, 8, (1, 3), padding=(0, 1), stride=(1, 2))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        h = self.stem(x)
        h = F.relu(h + self.norm(self.body(h)))
        return self.head(torch.tanh(self.last(F.silu(self.grouped(h)))).mean((2, 3)))


def shaken(model, seed=0):
    """In eval mode, with values of every parameter and buffer that show when they are left out."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif tensor.is_floating_point():
                size = 1.5 * math.prod(tensor.shape[1:]) ** -0.5 if tensor.ndim > 1 else 0.5
                tensor.copy_(size * torch.randn(tensor.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def small():
    return shaken(Small())


@pytest.fixture(scope="module")
def plain():
    """A convolution, BatchNorm and a linear layer: a score takes a fifth of the time of `small`'s."""
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(60, 5))
    return shaken(body)


@pytest.fixture
def own_tiles():
    """Leave the tiles as they are."""


@pytest.fixture(autouse=True)
def one_tile(request, monkeypatch):
    """A tile that holds a draw's pixels: in the interpreter time goes by programs. What tiles there are is checked by
    check_conv and check_perturb, and once here."""
    if "own_tiles" in request.fixturenames:
        return
    tile = {"block_m": 128, "block_o": 16, "block_k": 64, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(kernels, "conv_tile", lambda *a: tile)


@pytest.fixture(autouse=True)
def no_warning():
    """What is planned is planned in full, unless a test says otherwise."""
    torch_backend._warn_once.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def exact(model, images=IMAGES, labels=LABELS, **options):
    return stability_scores(model, images, labels, **options, dtype="float64", backend="reference")


def ours(model, images=IMAGES, labels=LABELS, **options):
    return stability_scores(model, images, labels, **({"dtype": "float32", "backend": "triton"} | options))


def agrees(model, images=IMAGES, labels=LABELS, **options):
    """Draw by draw within 1e-3·S + 1e-6 of float64, and float64 is not 0."""
    options = JOINT | {"reduce": "none"} | options
    expected = exact(model, images, labels, **options)
    assert (expected.abs() > 1e-5).any()
    found = ours(model, images, labels, **options)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 1e-3 * expected.abs() + 1e-6).all()
    return found


@pytest.mark.parametrize("family", ["gaussian", "rademacher", "rank1", "flipout"])
@pytest.mark.parametrize("antithetic", [False, True])
def test_families(small, family, antithetic):
    other = "rademacher" if antithetic else "gaussian"
    options = {"k": 4} if antithetic else {}
    agrees(small, family=family, input_family=other, antithetic=antithetic, **options)


@pytest.mark.usefixtures("own_tiles")
def test_the_tiles_of_the_kernel(small):
    agrees(small)


@pytest.mark.parametrize("divergence", ["cross_entropy", "flip", "margin", "total_variation"])
def test_divergences(small, divergence):
    agrees(small, divergence=divergence, sigma_w=0.3 if divergence != "flip" else 2.0)


def test_labels_of_another_integer_type():
    flat = shaken(nn.Sequential(nn.Flatten(), nn.Linear(70, 5)))
    options = JOINT | {"divergence": "margin"}
    assert torch.equal(ours(flat, **options), ours(flat, labels=LABELS.to(torch.uint8), **options))


def test_reductions(plain):
    draws, mean, worst = (ours(plain, **JOINT | {"k": 3, "reduce": r}) for r in ("none", "mean", "max"))
    assert draws.shape == (3, 3)
    assert torch.equal(mean, (draws[:, 0] + draws[:, 1] + draws[:, 2]) / 3)
    assert torch.equal(worst, draws.amax(1))


@pytest.mark.parametrize(
    ("family", "sigmas"),
    [("gaussian", (0.05, 0)), ("gaussian", (0, 0.1)), ("rademacher", (0.05, 0)), ("rademacher", (0, 0.1))],
)
def test_one_kind_of_noise(small, family, sigmas):
    """Without noise on the image the draws share the images until the first layer."""
    agrees(small, family=family, sigma_x=sigmas[0], sigma_w=sigmas[1])


@pytest.mark.parametrize("reduce", ["mean", "max", "none"])
def test_no_noise(small, reduce):
    options = JOINT | {"sigma_x": 0, "sigma_w": 0, "reduce": reduce}
    assert torch.equal(ours(small, **options), torch.zeros((3, 2) if reduce == "none" else 3))
    plain = F.cross_entropy(small(IMAGES), LABELS, reduction="none").detach()
    scores = ours(small, **options | {"reduce": "mean"}, divergence="cross_entropy")
    torch.testing.assert_close(scores, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "parameters"),
    [
        ("gaussian", "head"),
        ("rademacher", ["body", "norm.weight"]),
        ("flipout", ["body", "norm.weight"]),
        ("gaussian", lambda name: name.endswith("bias")),
    ],
)
def test_parameter_filter(small, family, parameters):
    agrees(small, family=family, parameters=parameters, sigma_x=0)


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_chunks_and_groups_change_no_bit(plain, family, monkeypatch):
    # The interpreter's dot is a BLAS's, whose bits depend on where a row stands (seen: OpenBLAS with AVX2). In float64,
    # rounded after, they do not, and what the kernels and the backend do is still compared bit by bit.
    blas = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, **_: blas(a.astype(float), b.astype(float)).astype(np.float32))
    options = JOINT | {"k": 6, "antithetic": True, "family": family, "reduce": "none"}
    seen = []
    logits = triton_backend._KernelRunner._logits

    def spy(self, images, first, draws, *, moves):
        seen.append((len(images), first, draws))
        return logits(self, images, first, draws, moves=moves)

    monkeypatch.setattr(triton_backend._KernelRunner, "_logits", spy)
    whole = ours(plain, **options)
    assert seen == [(3, 0, 1), (3, 0, 6)]
    assert torch.equal(ours(plain, **options, chunk=2), whole)
    largest = max(p.numel() for p in plain.parameters())
    for change, groups in (
        ({"SCRATCH": 2 * largest * 4}, [(3, 0, 1), (3, 0, 4), (3, 4, 2)]),
        ({"ACTIVATIONS": 1}, [(3, 0, 1), *((3, k, 1) for k in range(6))]),
        ({"MOST_DRAWS": 5}, [(3, 0, 1), (3, 0, 5), (3, 5, 1)]),
    ):
        seen.clear()
        with monkeypatch.context() as patch:
            for name, value in change.items():
                patch.setattr(triton_backend, name, value)
            assert torch.equal(ours(plain, **options), whole)
        assert seen == groups


def test_the_same_seed_gives_the_same_bits_and_another_does_not(plain):
    whole = ours(plain, **JOINT)
    assert torch.equal(ours(plain, **JOINT), whole)
    for seed in (JOINT["seed"] - 1, JOINT["seed"] - (1 << 63)):
        assert not torch.equal(ours(plain, **JOINT | {"seed": seed}), whole)


class Block(nn.Module):
    """Wiring that needs care when draws are run as further images."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4 if kind != "flat" else 70, 3)
        if kind == "prelu":
            self.act = nn.PReLU(4)
        if kind == "norm first":
            self.norm = nn.BatchNorm2d(2)
        if kind.startswith("statistics"):
            self.norm = nn.BatchNorm2d(4, affine=kind.endswith("affine"), track_running_stats=False)
        if kind == "function":
            self.factor = nn.Parameter(torch.ones(4))
        if kind == "image shape":
            self.square = nn.Conv2d(2, 2, 1)
        if kind == "large kernel":
            self.b = nn.Conv2d(4, 4, (1, 33), padding=(0, 16))
        if kind == "buffer":
            self.register_buffer("mean", torch.rand(2, 1, 1))
        if kind == "token":
            self.token = nn.Parameter(torch.ones(1, 1, 4))

    def forward(self, x):
        n = x.shape[0]
        if self.kind == "flat":
            return self.head(x.view(n, -1))
        if self.kind == "norm first":
            x = self.norm(x)
        if self.kind == "buffer":
            x = (x - self.mean) / 0.5
        if self.kind == "image shape":
            x = x + self.square(x)
        h = F.relu(self.a(x))
        if self.kind == "prelu":
            h = self.act(h)
        if self.kind == "function":
            h = h * self.factor.view(1, -1, 1, 1)
        if self.kind.startswith("statistics"):
            h = self.norm(torch.tanh(h))
        if self.kind == "batch mean":
            h = h - h.mean(0, keepdim=True)
        if self.kind == "channels first":
            h = h.permute(1, 0, 2, 3).mul(2).permute(1, 0, 2, 3)
        if self.kind == "twice":
            h = F.relu(self.b(h))
        h = F.relu(self.b(h)).reshape(n, 4, -1)
        if self.kind == "pixels first":
            # One row for each pixel and image: [35, n, 4] to [35 n, 4], which a layer takes for images.
            return self.head(h.permute(2, 0, 1).reshape(-1, 4)).view(35, n, 3).mean(0)
        if self.kind == "patches":
            return self.head(h.transpose(1, 2).reshape(-1, 4)).view(n, 35, 3).mean(1)
        if self.kind == "wide linear":
            return self.head(h.transpose(1, 2)).mean(1)
        if self.kind == "token":
            h = torch.cat([self.token.expand(n, -1, -1), h.transpose(1, 2)], dim=1)
            return self.head(h.mean(1))
        return self.head(h.mean(2))


KINDS = [
    "flat", "norm first", "statistics", "statistics affine", "function", "image shape", "large kernel", "buffer",
    "token", "batch mean", "channels first", "twice", "pixels first", "patches", "wide linear",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_wiring(kind):
    model, family = shaken(Block(kind)), "rademacher" if kind in ("large kernel", "patches") else "gaussian"
    agrees(model, labels=None, sigma_x=0, family=family)


@pytest.mark.parametrize("kind", ["norm first", "statistics", "image shape", "channels first"])
def test_wiring_with_noise_on_the_image(kind):
    agrees(shaken(Block(kind)), labels=None)


@pytest.mark.parametrize(("kind", "groups"), [("buffer", [(0, 1), (0, 2)]), ("token", [(0, 1), (0, 1), (1, 1)])])
def test_draws_run_together_where_they_can(kind, groups, monkeypatch):
    seen = []
    logits = triton_backend._KernelRunner._logits
    monkeypatch.setattr(
        triton_backend._KernelRunner, "_logits",
        lambda self, images, first, draws, *, moves: (
            seen.append((first, draws)) or logits(self, images, first, draws, moves=moves)
        ),
    )  # fmt: skip
    ours(shaken(Block(kind)), labels=None, **JOINT | {"sigma_x": 0})
    assert seen == groups


def test_as_many_images_as_draws_or_channels():
    for n in (1, 2, 4):
        images = torch.rand(n, 2, 7, 5, generator=torch.Generator().manual_seed(n))
        agrees(shaken(Block("function")), images, None, sigma_x=0)


def test_unknown_layers():
    model = shaken(Block("prelu"))
    with pytest.warns(UserWarning, match="'act' has the type PReLU"):
        agrees(model, labels=None)


def test_an_epilogue_without_a_kernel(monkeypatch):
    monkeypatch.setattr(epilogues, "_items", dict(epilogues._items))
    epilogues.add("tanh", Epilogue(compute=torch.tanh, matches=(torch.tanh,)))
    model = shaken(Small())
    fused = [step.epilogue for step, _ in plan_of(model, IMAGES).steps if hasattr(step, "epilogue")]
    assert "tanh" in fused
    agrees(model)


def test_tied_weights():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Linear(2, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.head(F.relu(self.b(F.relu(self.a(x)))).mean((2, 3)))

    for family in ("gaussian", "rademacher", "rank1"):
        agrees(shaken(Tied()), labels=None, family=family)


def test_gradient(plain):
    gradients, values = [], []
    for backend in ("triton", "torch"):
        x = IMAGES.clone().requires_grad_()
        scores = ours(plain, x, **JOINT, divergence="margin", backend=backend)
        (scores * torch.arange(1.0, 4.0)).sum().backward()
        gradients.append(x.grad)
        values.append(scores.detach())
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 1e-6
    torch.testing.assert_close(*values, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert not ours(plain, IMAGES.clone().requires_grad_(), **JOINT).requires_grad


@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
def test_bfloat16(small, family):
    options = JOINT | {"k": 4, "family": family}
    expected = exact(small, **options)
    found = ours(small, **options, dtype="bfloat16")
    assert found.dtype == torch.float32
    assert ((found - expected).abs() <= 5e-2 * expected + 1e-5).all()
    assert not torch.equal(found, ours(small, **options))


def test_signs_written_out_agree(small, monkeypatch):
    """Where that was measured to be faster, Rademacher noise goes through the scratch as other noise does."""
    options = JOINT | {"family": "rademacher", "dtype": "bfloat16"}
    expected = exact(small, **JOINT | {"family": "rademacher"})
    calls = []
    signs = triton_backend._KernelRunner._signs
    monkeypatch.setattr(triton_backend._KernelRunner, "_signs", lambda *a: calls.append(1) or signs(*a))
    expanded = ours(small, **options)
    before = len(calls)
    monkeypatch.setattr(triton_backend, "prefers_scratch", lambda *a: True)
    written = ours(small, **options)
    assert len(calls) - before < before  # what is left are linear layers
    for found in (expanded, written):
        assert ((found - expected).abs() <= 5e-2 * expected + 1e-5).all()


def test_the_library_agrees_and_shares_the_epilogue(small, monkeypatch):
    calls = []
    library = triton_backend.library_conv
    monkeypatch.setattr(triton_backend, "prefers_library", lambda *a: True)
    monkeypatch.setattr(triton_backend, "library_conv", lambda *a, **b: calls.append(1) or library(*a, **b))
    agrees(small)
    agrees(small, sigma_x=0)
    assert len(calls) == 2 * 2 * 4  # four convolutions, without and with noise


def test_the_kernels_are_used(small, monkeypatch):
    """Nothing falls back to torch's convolutions but the grouped one."""
    seen = []
    conv = F.conv2d
    monkeypatch.setattr(F, "conv2d", lambda x, w, *a: seen.append(a[-1]) or conv(x, w, *a))
    ours(small, **JOINT)
    assert set(seen) == {2}


def test_the_backend_is_chosen(plain, monkeypatch):
    chosen = []
    monkeypatch.setitem(
        backends._items, "triton",
        type(backends["triton"])(
            scores=lambda model, request: chosen.append(request.k) or triton_backend.scores(model, request),
            supports=triton_backend.supports, priority=10,
        ),
    )  # fmt: skip
    auto = stability_scores(plain, IMAGES, **JOINT, dtype="float32")
    assert chosen == [2]
    monkeypatch.setenv("SMI_KERNELS_BACKEND", "torch")
    stability_scores(plain, IMAGES, **JOINT, dtype="float32")
    assert chosen == [2]
    monkeypatch.setenv("SMI_KERNELS_BACKEND", "triton")
    assert torch.equal(stability_scores(plain, IMAGES, **JOINT, dtype="float32"), auto)
    assert chosen == [2, 2]


def test_what_is_not_supported(small, monkeypatch):
    refused = {"match": "'triton' cannot score"}
    with pytest.raises(InputError, **refused):
        ours(small, **JOINT, dtype="float64")
    with pytest.raises(InputError, **refused):
        ours(small, **JOINT, input_family="rank1")
    for registry, item in (
        (families, Family(elements=4, values=families["gaussian"].values)),
        (divergences, Divergence(compute=divergences["kl"].compute)),
    ):
        monkeypatch.setattr(registry, "_items", registry._items | {"mine": item})
    for options in ({"family": "mine"}, {"input_family": "mine"}, {"divergence": "mine"}):
        with pytest.raises(InputError, **refused):
            ours(small, **JOINT, **options)
        torch.testing.assert_close(
            ours(small, **JOINT, **options, backend="auto"), ours(small, **JOINT, backend="torch"), rtol=1e-5, atol=0
        )

    class Branching(Small):
        def forward(self, x):
            return super().forward(x if x.max() > 0.5 else 2 * x)

    with pytest.raises(InputError, **refused):
        ours(shaken(Branching()), **JOINT)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, **refused):
        ours(small, **JOINT)


def test_bad_logits(small):
    broken = copy.deepcopy(small)
    with torch.no_grad():
        broken.head.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match="logits without any noise hold NaN"):
        ours(broken, **JOINT)

    class Brittle(nn.Module):
        def forward(self, x):
            return torch.stack([x.amin((1, 2, 3)).log(), x.amax((1, 2, 3))], dim=1)

    for net, match in (
        (nn.Flatten(0), r"shape \(210,\) for 3 images"),
        (nn.Identity(), r"shape \(3, 2, 7, 5\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(70, 1)), r"shape \(3, 1\).*2 classes"),
        (Brittle(), "logits under noise hold NaN or infinity.*smaller"),
    ):
        with pytest.raises(InputError, match=match):
            ours(net.eval(), labels=None, **JOINT)
    with pytest.raises(InputError, match="The labels run from 0 to 4"):
        ours(shaken(nn.Sequential(nn.Flatten(), nn.Linear(70, 3))), **JOINT)


def test_the_model_and_the_images_are_unchanged(plain):
    before, images = copy.deepcopy(plain.state_dict()), IMAGES.clone()
    ours(plain, images, **JOINT)
    assert torch.equal(images, IMAGES)
    assert all(torch.equal(before[name], value) for name, value in plain.state_dict().items())


def test_any_layout_of_images_and_weights(plain):
    whole = ours(plain, **JOINT)
    transposed = IMAGES.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(ours(plain, transposed, **JOINT), whole)
    model = copy.deepcopy(plain).to(memory_format=torch.channels_last)
    images = IMAGES.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ours(model, images, **JOINT), whole)
