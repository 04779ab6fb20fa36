"""The three classifiers that are timed, with weights, statistics and images that are random but of usual size.

The layers are those of the classifiers in `smi`, written again because this package knows nothing of `smi`. The
weights are not trained: no time depends on them. Their scale does matter to the scores, and so to the error that is
reported beside the times: no tensor is zero, activations neither vanish nor explode, and logits spread as those of a
trained classifier do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10
SIZE = 32
LOGIT_STD = 3.0


def conv_bn(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> list[nn.Module]:
    """A convolution and its BatchNorm."""
    return [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs)]


def _block(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(*conv_bn(inputs, outputs, stride, kernel), nn.ReLU())


class Residual(nn.Module):
    """The basic block of a ResNet: relu(main(x) + shortcut(x))."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.main = nn.Sequential(*conv_bn(inputs, outputs, stride), nn.ReLU(), *conv_bn(outputs, outputs))
        change = inputs != outputs or stride != 1
        self.shortcut = nn.Sequential(*(conv_bn(inputs, outputs, stride, kernel=1) if change else []))

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return F.relu(self.main(x) + self.shortcut(x))


class Normalised(nn.Module):
    """A body behind per-channel normalisation: images in [0, 1] in, logits out."""

    mean: Tensor
    std: Tensor

    def __init__(self, body: nn.Sequential, channels: int) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", torch.full((1, channels, 1, 1), 0.5))
        self.register_buffer("std", torch.full((1, channels, 1, 1), 0.25))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` to logits ``[N, classes]``."""
        return self.body((images - self.mean) / self.std)


def _small_cnn(channels: int) -> list[nn.Module]:
    return [
        _block(channels, 24, 2, kernel=5), _block(24, 48), _block(48, 64, 2), _block(64, 64), _block(64, 96, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, CLASSES),
    ]  # fmt: skip


def _small_vgg(channels: int) -> list[nn.Module]:
    return [
        _block(channels, 32), _block(32, 32), nn.MaxPool2d(2),
        _block(32, 64), _block(64, 64), nn.MaxPool2d(2),
        _block(64, 128), _block(128, 128), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(128, CLASSES),
    ]  # fmt: skip


def _resnet18(channels: int) -> list[nn.Module]:
    layers: list[nn.Module] = [_block(channels, 64)]
    for inputs, outputs, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        layers += [Residual(inputs, outputs, stride), Residual(outputs, outputs, 1)]
    return [*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES)]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Channels of the images, and channels to layers."""

    channels: int
    layers: Callable[[int], list[nn.Module]]


ARCHITECTURES = {
    "small_cnn": Architecture(channels=1, layers=_small_cnn),
    "small_vgg": Architecture(channels=3, layers=_small_vgg),
    "resnet18": Architecture(channels=3, layers=_resnet18),
}
"""What is timed, by name."""


def make_images(name: str, n: int, *, seed: int = 0) -> Tensor:
    """Random images ``[n, C, 32, 32]`` in [0, 1] for a model: blurred blobs and pixel noise.

    Of one seed, fewer images are the first of more, so that references can be shared between values of n.
    """
    channels = ARCHITECTURES[name].channels
    rng = torch.Generator().manual_seed(1000 + seed)
    images = []
    for _ in range(n):
        blobs = F.interpolate(torch.rand(1, channels, 4, 4, generator=rng), size=SIZE, mode="bicubic")
        images.append(1.6 * (blobs - 0.5) + 0.5 + 0.05 * torch.randn(blobs.shape, generator=rng))
    return torch.cat(images).clamp(0, 1)


def make_model(name: str, *, seed: int = 0) -> Normalised:
    """A classifier in eval mode with random weights; depends on ``seed`` alone."""
    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Normalised(nn.Sequential(*architecture.layers(architecture.channels)), architecture.channels)
        images = make_images(name, 64, seed=seed + 1)
        _set_batch_norms(model, images)
        _set_logits(model, images)
    return model


def _set_batch_norms(model: Normalised, images: Tensor) -> None:
    """Random affine parameters, and statistics that are those of some images, moved a little at random."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
        norm.momentum = 1.0  # the statistics become those of the next batch
    model.train()(images)
    model.eval()
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.add_(0.1 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(0.8, 1.25))
        norm.momentum = 0.1


def _set_logits(model: Normalised, images: Tensor) -> None:
    last = model.body[-1]
    assert isinstance(last, nn.Linear)
    scale = LOGIT_STD / model(images).std()
    last.weight.mul_(scale)
    last.bias.mul_(scale)
