"""Small stand-ins that several test files share."""

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.func import functional_call

from smi.domains import Domain, PrivateData, PrivateSet, PublicImages
from smi.erasure import Found
from smi.erasure.families import families
from smi.models.classifiers import Classifier


def tiny_model(channels=1, size=8, classes=3, seed=0):
    """A classifier with a convolution, BatchNorm and a linear layer; its weights depend on the seed alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = nn.Sequential(
            nn.Conv2d(channels, 4, 3, 2, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
            nn.Linear(4 * (size // 2) ** 2, classes),
        )  # fmt: skip
        nn.init.normal_(body[4].weight)
    return Classifier(body, [0.5] * channels, [0.25] * channels).eval()


class TinyPrior(nn.Module):
    """A linear generator with a critic, ``[1, 8, 8]`` by default: satisfies `smi.priors.base.Prior`."""

    def __init__(self, channels=1, size=8, latent_dim=6):
        super().__init__()
        self.latent_dim, self.image_shape = latent_dim, (channels, size, size)
        rng = torch.Generator().manual_seed(3)
        self.basis = nn.Parameter(torch.randn(latent_dim, channels * size * size, generator=rng) / 2)

    def generate(self, z):
        return (z @ self.basis).sigmoid().view(-1, *self.image_shape)

    def criticise(self, images):
        return -(images - 0.5).square().flatten(1).mean(1)


class Lookup(nn.Module):
    """Logits by a function from images to predicted classes, for models whose every answer is known."""

    def __init__(self, predict, classes):
        super().__init__()
        self.predict, self.classes = predict, classes

    def forward(self, images):
        return 10 * nn.functional.one_hot(self.predict(images), self.classes).float()


def coded_set(labels, classes, size=8):
    """Images whose upper left pixel tells the label (label / 100), so that a `Lookup` can read it."""
    labels = torch.tensor(labels)
    images = torch.full((len(labels), 1, size, size), 0.2)
    images[:, 0, 0, 0] = labels / 100
    return PrivateSet(images, labels, classes)


def read_label(images):
    return (images[:, 0, 0, 0] * 100).round().long()


def tiny_domain(size=8):
    """Three classes told apart by which third is bright; public images are noise."""
    rng = torch.Generator().manual_seed(1)

    def part(n):
        labels = torch.arange(n) % 3
        images = 0.3 * torch.rand(n, 1, size, size, generator=rng)
        for image, label in zip(images, labels.tolist(), strict=True):
            image[:, :, size * label // 3 : size * (label + 1) // 3] += 0.6
        return PrivateSet(images, labels, 3)

    public = PublicImages(torch.rand(20, 1, size, size, generator=rng))
    return Domain("tiny", ("left", "middle", "right"), PrivateData(part(60), part(30)), public)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape, seed=0):
    """uint8 images of noise."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)
    return path


def state_of(model):
    """A copy of everything that using a model must not change."""
    modes = [module.training for module in model.modules()]
    asks = [(p.requires_grad, p.grad is None) for p in model.parameters()]
    return {name: value.clone() for name, value in model.state_dict().items()}, modes, asks


def same_state(first, second):
    (a, *rest), (b, *others) = first, second
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) and rest == others


def check_repair(defense, samples, public, *, keeps_statistics=True):
    """What every defense promises: a copy changes and nothing else, and again the same way. Returns the repair."""
    model = tiny_model()
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.random.get_rng_state()
    first, again = (defense.repair(model, samples, public, seed=5) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
    repaired, repeated = first.model.state_dict(), again.model.state_dict()
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), f"{name} of the suspect model changed"
        assert torch.equal(repaired[name], repeated[name]), f"{name} differs from run to run"
        if "running" in name and keeps_statistics:
            assert torch.equal(repaired[name], value), "BatchNorm statistics must stay frozen"
    assert any(not torch.equal(repaired[name], value) for name, value in before.items())
    assert not first.model.training
    hooks = [h for m in (model, first.model) for k in m.modules() for h in k._forward_hooks]
    assert not hooks, "a hook was left behind"
    return first


def runner(model):
    """Exact float32, where the one in use may be bfloat16."""

    def run(images, parameters=None):
        return model(images) if parameters is None else functional_call(model, dict(parameters), (images,))

    return run


def found(sizes, reach=0.9, family="additive", targets=None, seed=0):
    """Triggers whose sizes are given and whose pattern means nothing."""
    count = len(sizes)
    targets = torch.arange(count) if targets is None else torch.tensor(targets)
    numbers = families[family].start(count, torch.Size((1, 32, 32)), torch.Generator().manual_seed(seed))
    reached = torch.full((count,), reach) if isinstance(reach, float) else torch.tensor(reach)
    return Found(family, targets, numbers, torch.tensor(sizes), reached)
