"""The recorded forward pass: what is folded, fused and refused, and that scores are those of the model itself."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from smi_kernels import InputError, register_layer, stability_scores
from smi_kernels.backends import torch as torch_backend
from smi_kernels.graph.layers import layers
from smi_kernels.graph.plan import Layer, plan_of
from smi_kernels.graph.tracing import NotTraceable, trace

OPTIONS = {"k": 4, "sigma_x": 0.05, "sigma_w": 0.1, "seed": 5}
IMAGES = torch.rand(5, 2, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def fresh_warnings():
    torch_backend._warn_once.cache_clear()


def shaken(model):
    """In eval mode, with BatchNorms that do something."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                if module.affine:
                    module.weight.copy_(0.5 + torch.rand(module.num_features, generator=generator))
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def agrees(model, images=IMAGES, **options):
    """Scores of the plan are those of the model itself, draw by draw, in every format."""
    options = OPTIONS | options
    exact = stability_scores(model, images, **options, dtype="float64", backend="reference")
    ours = stability_scores(model, images, **options, dtype="float64", backend="torch")
    torch.testing.assert_close(ours, exact, rtol=1e-6, atol=1e-12)
    assert (exact > 1e-6).all()
    low = stability_scores(model, images, **options, dtype="float32", backend="torch").double()
    assert ((low - exact).abs() <= 1e-3 * exact + 1e-6).all()
    low = stability_scores(model, images, **options, dtype="bfloat16", backend="torch").double()
    assert ((low - exact).abs() <= 5e-2 * exact + 1e-4).all()


def head(width, size=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(width * size * size, 5))


GEOMETRIES = {
    "stride": {"stride": 2, "padding": 1},
    "uneven": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    "groups": {"groups": 2, "padding": 1},
    "depthwise": {"groups": 4, "padding": 1},
    "same": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "circular": {"padding": (1, 2), "padding_mode": "circular"},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("norm", [False, True])
def test_convolutions(geometry, norm):
    torch.manual_seed(0)
    body = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 8, 3, **geometry), *([nn.BatchNorm2d(8)] if norm else [])]
    model = nn.Sequential(*body, nn.SiLU(), nn.AdaptiveAvgPool2d(2), head(8, 2))
    agrees(shaken(model))


def test_same_padding_of_an_even_kernel():
    torch.manual_seed(0)
    agrees(nn.Sequential(nn.Conv2d(2, 4, 2, padding="same"), nn.ReLU(), head(4)).eval())


@pytest.mark.parametrize("options", [{"affine": False}, {"eps": 0.1}, {"track_running_stats": False}])
def test_batch_norm_variants(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4, **options), nn.ReLU(), head(4))
    agrees(shaken(model))


class Wired(nn.Module):
    """Wiring that must not be fused, or only in part."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.a, self.na = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.b, self.nb = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = head(4)

    def forward(self, x):
        h = self.a(x)
        if self.kind == "norm of a value read twice":
            return self.head(F.relu(self.na(h)) + h)
        if self.kind == "norm before the layer":
            return self.head(self.b(F.relu(self.na(F.relu(h)))))
        if self.kind == "two norms":
            return self.head(F.relu(self.nb(self.na(h))))
        if self.kind == "activation before the residual":
            return self.head(F.relu(self.nb(self.b(h))) + h)
        if self.kind == "norm after the residual":
            return self.head(self.nb(self.b(h) + h).relu())
        if self.kind == "both branches are layers":
            return self.head(torch.relu(torch.add(self.na(h), self.nb(self.b(h)))))
        if self.kind == "a value added to itself":
            return self.head(F.relu(h + h))
        if self.kind == "weighted sum":
            return self.head(F.relu(torch.add(self.b(h), h, alpha=0.5)))
        if self.kind == "broadcast sum":
            return self.head(F.relu(self.b(h) + h.mean((2, 3), keepdim=True)))
        if self.kind == "same layer twice":
            return self.head(F.relu(self.b(F.relu(self.b(F.relu(h))))))
        if self.kind == "in place":
            h = F.relu(self.na(h), inplace=True)
            y = self.nb(self.b(h))
            y += h
            return self.head(y.relu_())
        if self.kind == "view of a layer's output":
            return self.head[1](F.relu(h).view(h.size(0), -1))
        n, c, height, width = x.shape
        assert (c, height, width, x.ndim, x.size(-1)) == (2, 8, 8, 4, 8)
        return self.head(F.relu(h).reshape(n, -1, height, width).view(x.size(0), *h.shape[1:]))


KINDS = [
    "norm of a value read twice", "norm before the layer", "two norms", "activation before the residual",
    "norm after the residual", "both branches are layers", "a value added to itself", "weighted sum", "broadcast sum",
    "same layer twice", "in place", "view of a layer's output", "shapes",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_wiring(kind):
    torch.manual_seed(0)
    model = shaken(Wired(kind))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(model)
        agrees(model, images=IMAGES[:1])


def test_what_is_fused():
    model = shaken(Wired("both branches are layers"))
    steps = [step for step, _ in plan_of(model, IMAGES).steps if isinstance(step, Layer)]
    assert [(s.module, s.norm, s.residual is not None, s.epilogue, s.is_end) for s in steps] == [
        ("a", None, False, "identity", True),
        ("b", "nb", True, "relu", False),
        ("head.1", None, False, "identity", True),
    ]
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 3)).eval()
    (first, *_, last) = [step for step, _ in plan_of(model, IMAGES).steps]
    assert (first.norm, first.epilogue, last.epilogue) == ("1", "relu6", "identity")
    model = torch.nn.Sequential(Wired("in place"))
    fused = [s for s, _ in plan_of(model.eval(), IMAGES).steps if isinstance(s, Layer) and s.residual is not None]
    assert [(s.norm, s.epilogue) for s in fused] == [("0.nb", "relu")]


@pytest.mark.parametrize("arch", ["resnet18", "mobilenet_v2", "densenet121", "squeezenet1_1"])
def test_published_architectures_are_planned_and_agree(arch):
    import torchvision

    torch.manual_seed(0)
    model = shaken(getattr(torchvision.models, arch)(num_classes=6))
    images = torch.rand(2, 3, 32, 32)
    options = {"k": 2, "sigma_x": 0.05, "sigma_w": 0.02, "dtype": "float64"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = stability_scores(model, images, **options)
    torch.testing.assert_close(
        ours, stability_scores(model, images, **options, backend="reference"), rtol=1e-5, atol=1e-12
    )


class Bad(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.head = head(2)

    def forward(self, x):
        if self.kind == "value" and x.max() > 0.5:
            x = x * 0.9
        if self.kind == "batch" and len(x) > 2:
            x = x * 0.9
        if self.kind == "baked":
            x = x.reshape(1, -1, 8, 8) * (1 / x.reshape(1, -1, 8, 8).shape[1]) * len(x.shape)
            x = x.reshape(-1, 2, 8, 8)
        if self.kind == "constant":
            x = x * torch.tensor([0.5])
        if self.kind == "shared in place":
            y = x + 1
            y.mul_(0.5)
            x = y
        return self.head(x)


@pytest.mark.parametrize("kind", ["value", "batch", "constant", "baked", "shared in place", "hook"])
def test_a_forward_that_cannot_be_recorded_is_scored_by_the_reference_with_one_warning(kind):
    torch.manual_seed(0)
    model = Bad(kind).eval()
    if kind == "hook":
        model.head.register_forward_hook(lambda module, inputs, output: 2 * output)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NotTraceable):
        plan_of(model, IMAGES)
    with pytest.warns(UserWarning, match="Bad is scored by the slow path, correctly: ") as caught:
        first, second = (stability_scores(model, IMAGES, **OPTIONS, dtype="float32") for _ in range(2))
    assert len([w for w in caught if "slow path" in str(w.message)]) == 1
    assert torch.equal(first, second)
    assert torch.equal(first, stability_scores(model, IMAGES, **OPTIONS, dtype="float32", backend="reference"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


class Scaled(nn.Module):
    """A layer with a parameter of its own type; as a leaf it is known only if registered."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))

    def forward(self, x):
        return x * self.factor.view(1, -1, 1, 1)


def test_unknown_layers_are_right_and_named_in_one_warning():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.PReLU(4), nn.GroupNorm(2, 4), head(4)).eval()
    with pytest.warns(UserWarning, match="does not know") as caught:
        agrees(model)
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2
    assert "Layer '1' has the type PReLU" in messages[0]
    assert "Layer '2' has the type GroupNorm" in messages[1]


def test_parameters_used_by_functions_need_no_registration():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Scaled(), nn.ReLU(), head(4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(model)


def test_register_layer(monkeypatch):
    mine = dict(layers)
    for module in ("graph.layers", "graph.plan", "graph.tracing", "backends.torch"):
        monkeypatch.setattr(f"smi_kernels.{module}.layers", mine)
    seen = []

    def apply(module, tensors, x):
        seen.append(tensors["weight"])
        return F.prelu(x, tensors["weight"])

    register_layer(nn.PReLU, apply)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.PReLU(4), head(4)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        agrees(model)
    assert len({w.sum().item() for w in seen if w.dtype == torch.float64}) == 1 + OPTIONS["k"]  # clean, then each draw
    with pytest.raises(InputError, match="registered already"):
        register_layer(nn.PReLU, apply)
    with pytest.raises(InputError, match="not a layer type"):
        register_layer(lambda x: x, apply)


def test_the_plan_follows_the_model():
    """A plan is kept, but not when the model has changed in anything but the values of its tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), head(4)).eval()
    first = plan_of(model, IMAGES)
    with torch.no_grad():
        model[0].weight.mul_(2)
    assert plan_of(model, IMAGES) is first
    agrees(model)
    model[1] = nn.Tanh().eval()
    assert plan_of(model, IMAGES) is not first
    agrees(model)
    model[0].stride = (2, 2)
    model[2] = head(4, 4).eval()
    agrees(model)
    switch = Bad("none").eval()
    plan_of(switch, IMAGES)
    switch.kind = "value"
    with pytest.raises(NotTraceable):
        plan_of(switch, IMAGES)


def test_tracing_writes_nothing_to_the_model():
    class Careless(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head(2)

        def forward(self, x):
            self.last = x
            return self.head(x)

    model = Careless().eval()
    trace(model, IMAGES)
    assert not hasattr(model, "last")


def test_subclasses_and_parametrized_layers_keep_their_own_forward():
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), Doubled(128, 6), nn.ReLU(), nn.Linear(6, 4))
    nn.utils.parametrizations.weight_norm(model[3])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agrees(model.eval())


def test_float16():
    torch.manual_seed(0)
    model = shaken(nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), head(4, 4)))
    exact = stability_scores(model, IMAGES, **OPTIONS, dtype="float64")
    for backend in ("torch", "reference"):
        low = stability_scores(model, IMAGES, **OPTIONS, dtype="float16", backend=backend).double()
        assert ((low - exact).abs() <= 2e-2 * exact + 1e-4).all()
