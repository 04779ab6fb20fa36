"""Classifiers: architectures, a wrapper that normalises, and training.

A model of this project maps float32 images ``[N, C, H, W]`` in [0, 1] to logits ``[N, classes]``; the normalisation
lives inside `Classifier`, so that nothing outside a model ever sees normalised pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.domains.augment import random_affine, random_crop_flip
from smi.errors import InputError
from smi.runtime.checks import check_number
from smi.runtime.compute import fast
from smi.runtime.progress import track
from smi.runtime.seeding import derive, stream
from smi_kernels import Registry

architectures: Registry[Callable[[int, int], nn.Module]] = Registry("architecture")


def _conv(inputs: int, outputs: int, stride: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@architectures.register("small_cnn")
def small_cnn(channels: int, num_classes: int) -> nn.Module:
    """Five convolutions, three of them strided, and global pooling; 0.13 M weights: enough for digits."""
    return nn.Sequential(
        _conv(channels, 24, 2, kernel=5), _conv(24, 48), _conv(48, 64, 2), _conv(64, 64), _conv(64, 96, 2),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, num_classes),
    )  # fmt: skip


@architectures.register("small_vgg")
def small_vgg(channels: int, num_classes: int) -> nn.Module:
    """Six 3×3 convolutions with max pooling, 0.3 M weights: colour images on a CPU."""
    return nn.Sequential(
        _conv(channels, 32), _conv(32, 32), nn.MaxPool2d(2),
        _conv(32, 64), _conv(64, 64), nn.MaxPool2d(2),
        _conv(64, 128), _conv(128, 128), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(128, num_classes),
    )  # fmt: skip


@architectures.register("elu_vgg")
def elu_vgg(channels: int, num_classes: int) -> nn.Module:
    """Six 3×3 convolutions with ELU and dropout, one linear layer on the flattened map of a 32×32 image; 0.3 M weights.

    The network of Zeng et al. (I-BAU, ICLR 2022) in their code.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for width, dropout in ((32, 0.3), (64, 0.4), (128, 0.4)):
        for _ in range(2):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ELU()]
            inputs = width
        layers += [nn.MaxPool2d(2), nn.Dropout(dropout)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 4 * 4, num_classes))


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3×3 convolution, twice, beside a shortcut (He et al., "Identity Mappings", 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Sequential(
            nn.BatchNorm2d(outputs), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        active = F.relu(self.norm(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        return self.second(self.first(active)) + shortcut


@architectures.register("small_preact")
def small_preact(channels: int, num_classes: int) -> nn.Module:
    """A small ResNet with pre-activation: five blocks of 32 to 128 channels, 0.7 M weights."""
    blocks = [
        PreActivationBlock(*sizes) for sizes in ((32, 32, 1), (32, 64, 2), (64, 64, 1), (64, 128, 2), (128, 128, 1))
    ]
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, 1, 1, bias=False), *blocks, nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, num_classes),
    )  # fmt: skip


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with a shortcut (He et al., 2016, the basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = _conv(inputs, outputs, stride)
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        )

    def forward(self, x: Tensor) -> Tensor:
        """``[N, inputs, H, W]`` to ``[N, outputs, H / stride, W / stride]``."""
        return F.relu(self.second(self.first(x)) + self.shortcut(x))


@architectures.register("resnet18")
def resnet18(channels: int, num_classes: int) -> nn.Module:
    """ResNet-18 for 32×32 images: a 3×3 stem without pooling, 11.2 M weights."""
    blocks: list[nn.Module] = [_conv(channels, 64)]
    for inputs, outputs, stride in [(64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)]:
        blocks += [ResidualBlock(inputs, outputs, stride), ResidualBlock(outputs, outputs, 1)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, num_classes))


class Classifier(nn.Module):
    """A body behind per-channel normalisation: images in [0, 1] in, logits out.

    Attributes:
        body: Any module from normalised images to logits.
        mean: Per channel, in units of [0, 1] pixels.
        std: The same, above zero.
        image_shape: ``(C, H, W)`` that it was trained on; None where that is not known.

    >>> import torch
    >>> body = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 10))
    >>> Classifier(body, mean=[0.5] * 3, std=[0.25] * 3)(torch.rand(2, 3, 8, 8)).shape
    torch.Size([2, 10])
    """

    mean: Tensor
    std: Tensor
    image_shape: tuple[int, ...] | None = None  # (C, H, W) it was trained on, where that is known

    def __init__(self, body: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std) <= 0:
            raise InputError("mean and std need one value a channel, std above zero.")
        self.body = body
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1] to logits ``[N, classes]``."""
        if images.shape[1] != self.mean.shape[1]:  # broadcasting would make colour of grey and nobody would notice
            raise InputError(f"The images have {images.shape[1]} channels, the classifier {self.mean.shape[1]}.")
        return self.body((images - self.mean) / self.std)


def build_classifier(arch: str, channels: int, num_classes: int, *, seed: int = 0) -> Classifier:
    """An untrained classifier; its initial weights depend on ``seed`` alone, and the global generator is not used.

    >>> import torch
    >>> model = build_classifier("small_cnn", channels=1, num_classes=10).eval()
    >>> model(torch.zeros(2, 1, 32, 32)).shape
    torch.Size([2, 10])
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "init"))
        body = architectures[arch](channels, num_classes)
    return Classifier(body, [0.5] * channels, [0.25] * channels)


class TrainingSet(Protocol):
    """Images, labels and a class count: a `PrivateSet` or a poisoned one."""

    @property
    def images(self) -> Tensor:
        """``[N, C, H, W]`` in [0, 1]."""

    @property
    def labels(self) -> Tensor:
        """``[N]``."""

    @property
    def num_classes(self) -> int:
        """Number of classes."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How a classifier is trained: SGD with Nesterov momentum under a one-cycle schedule, label smoothing off.

    Attributes:
        arch: A name in `architectures`.
        epochs: Passes over the training set.
        batch_size: Images a step, or a few more where they do not come out even.
        lr: Largest learning rate of the schedule.
        weight_decay: Of SGD.
        augment: "affine" (small rotation, shift, zoom: digits), "crop_flip" (natural images), "crop" or "none".
    """

    arch: str = "small_cnn"
    epochs: int = 12
    batch_size: int = 128
    lr: float = 0.1
    weight_decay: float = 5e-4
    augment: str = "affine"

    def __post_init__(self) -> None:
        if self.arch not in architectures:
            architectures[self.arch]
        if self.augment not in AUGMENTATIONS:
            raise InputError(f"augment is {self.augment!r}. Allowed: {', '.join(AUGMENTATIONS)}.")
        check_number("epochs", self.epochs, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=2, integer=True)
        check_number("lr", self.lr, low=0)
        check_number("weight_decay", self.weight_decay, low=0)


AUGMENTATIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "affine": lambda x, rng: random_affine(x, rng, degrees=8, shift=2, zoom=0.08),
    "crop": lambda x, rng: random_crop_flip(x, rng, flip=False),
    "crop_flip": random_crop_flip,
    "none": lambda x, rng: x,
}


def train_classifier(
    data: TrainingSet, config: TrainConfig = TrainConfig(), *, seed: int = 0, device: str | torch.device = "cpu"
) -> Classifier:
    """Train a classifier on ``data``.

    The attacker's side of the story: with poisoned data the result is a backdoored model.

    Args:
        data: A `PrivateSet`, or what `smi.poison` returns.
        config: Default: `TrainConfig`.
        seed: Of initial weights, order and augmentation.
        device: Where it is trained.

    Returns:
        The classifier in eval mode, on ``device``.
    """
    model = build_classifier(config.arch, data.images.shape[1], data.num_classes, seed=seed).to(device)
    rng, augment = stream(seed, "train"), AUGMENTATIONS[config.augment]
    steps = max(1, len(data.images) // config.batch_size)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.epochs * steps)
    model.train()
    with fast(model) as run:
        for _ in track(range(config.epochs), "training", config.epochs):
            order = torch.randperm(len(data.images), generator=rng)
            for batch in order.tensor_split(steps):
                loss = F.cross_entropy(run(augment(data.images[batch], rng)), data.labels[batch].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    model.image_shape = tuple(data.images.shape[1:])
    return model.eval()
