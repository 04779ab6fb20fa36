"""Several draws in one forward pass with layers in C, against the draws one by one."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smi_kernels import native, stability_scores
from smi_kernels.backends import fused

pytestmark = pytest.mark.skipif(
    not native.convolves(torch.float32), reason="there is no C compiler, or the processor has no wide vectors"
)
FORMATS = ["float32"] + ["bfloat16"] * native.convolves(torch.bfloat16)
SETTINGS = [{"sigma_x": 0.1, "sigma_w": 0.05}, {"sigma_x": 0.0, "sigma_w": 0.1}, {"sigma_x": 0.1, "sigma_w": 0.0}]


class Varied(nn.Module):
    """A residual, a strided, a grouped and a 1×1 convolution, pooling and a concatenation in between, two heads."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.block = nn.Conv2d(6, 6, 3, padding=1)
        self.groups = nn.Conv2d(6, 8, 3, stride=2, groups=2, padding=1)
        self.point = nn.Conv2d(16, 5, 1)
        self.hidden, self.head = nn.Linear(20, 7), nn.Linear(7, 4)

    def forward(self, x):
        h = F.relu(self.norm(self.stem(x)))
        h = F.relu(self.block(h) + h)
        h = F.max_pool2d(F.silu(self.groups(h)), 3, stride=1, padding=1)
        h = self.point(F.max_pool2d(torch.cat([h, h.tanh()], 1), 2))
        return self.head(F.relu(self.hidden(h.flatten(1))))


@pytest.fixture(scope="module")
def varied():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Varied().eval()
        with torch.no_grad():
            model.norm.running_mean.normal_()
            model.norm.weight.uniform_(0.5, 2)
            model.norm.bias.normal_()
    return model


@pytest.fixture
def small():
    return torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def one_by_one(monkeypatch):
    monkeypatch.setattr("smi_kernels.backends.together.runs", lambda *_: False)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["gaussian", "rademacher"])
@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("dtype", FORMATS)
def test_agrees_with_draws_one_by_one(varied, small, setting, family, antithetic, dtype, monkeypatch):
    options = setting | {"k": 6, "family": family, "antithetic": antithetic, "reduce": "none"}
    used, run = [], fused.run_layer
    monkeypatch.setattr(fused, "run_layer", lambda *a: used.append(True) or run(*a))
    ours = stability_scores(varied, small, **options, dtype=dtype)
    assert used
    exact = stability_scores(varied, small, **options, dtype="float64", backend="reference").float()
    bound = 1e-3 * exact + 1e-6 if dtype == "float32" else 0.1 * exact + 2e-4
    assert ((ours - exact).abs() <= bound).all()
    one_by_one(monkeypatch)
    alone = stability_scores(varied, small, **options, dtype=dtype)
    assert ((ours - alone).abs() <= bound).all()


@pytest.mark.parametrize("parameters", ["stem", ["norm", "head.bias"]])
def test_filter_labels_and_reductions(varied, small, parameters, monkeypatch):
    labels = torch.tensor([0, 3, 1])
    options = {"k": 5, "sigma_x": 0.05, "sigma_w": 0.1, "parameters": parameters, "dtype": "float32"}
    for more in ({"reduce": "max", "divergence": "margin"}, {"divergence": "cross_entropy"}):
        exact = stability_scores(varied, small, labels, **options, **more, backend="reference")
        ours = stability_scores(varied, small, labels, **options, **more)
        torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)


def test_groups_of_any_size(varied, small, monkeypatch):
    options = {"k": 7, "sigma_x": 0.1, "sigma_w": 0.05, "dtype": "float32", "reduce": "none"}
    whole = stability_scores(varied, small, **options)
    for draws in (1, 2, 3, 4):
        monkeypatch.setattr("smi_kernels.backends.together.GROUP", draws)
        part = stability_scores(varied, small, **options)
        torch.testing.assert_close(part, whole, rtol=1e-3, atol=1e-6)
        few = stability_scores(varied, small, **options, chunk=2)
        torch.testing.assert_close(few, whole, rtol=1e-3, atol=1e-6)


def test_same_bits_every_time(varied, small):
    options = {"k": 6, "sigma_x": 0.1, "sigma_w": 0.05}
    assert torch.equal(*(stability_scores(varied, small, **options) for _ in range(2)))


def test_a_value_that_is_not_a_number_is_refused(varied, small):
    model = nn.Sequential(varied, nn.Linear(4, 3)).eval()
    with torch.no_grad():
        model[1].weight[0, 0] = 1e38
    with pytest.raises(ValueError, match="logits"):
        stability_scores(model, small, k=4, sigma_x=0.1, sigma_w=100.0, dtype="float32")


class Coupled(nn.Module):
    """Images of a batch that see each other: the draws of one must not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(4, 3)
        self.norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False)

    def forward(self, x):
        h = F.relu(self.conv(x))
        if self.kind == "statistics":
            h = self.norm(h)
        if self.kind == "mean":
            h = h - h.mean(0, keepdim=True)
        if self.kind == "pixels first":
            n = h.shape[0]
            return self.head(h.permute(2, 3, 0, 1).reshape(-1, 4)).reshape(8, 8, n, 3).mean((0, 1))
        if self.kind == "flattened":
            return self.head(h.permute(0, 2, 3, 1).reshape(-1, 4)).reshape(-1, 64, 3).mean(1)
        return self.head(h.square().mean((2, 3)))


@pytest.mark.parametrize("kind", ["statistics", "mean", "pixels first", "flattened"])
@pytest.mark.parametrize("family", ["gaussian", "rank1"])
def test_batches_whose_images_depend_on_one_another(kind, family, small):
    torch.manual_seed(0)
    model, options = Coupled(kind).eval(), {"k": 8, "sigma_x": 0.1, "sigma_w": 0.05, "family": family, "reduce": "none"}
    exact = stability_scores(model, small, **options, dtype="float64", backend="reference").float()
    ours = stability_scores(model, small, **options, dtype="float32", backend="torch")
    assert ((ours - exact).abs() <= 1e-3 * exact + 1e-6).all()
