"""Input-aware dynamic attack (Nguyen & Tran, "Input-Aware Dynamic Backdoor Attack", NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.attacks.base import Attack, attacks
from smi.domains.base import PrivateSet
from smi.errors import InputError
from smi.models.classifiers import AUGMENTATIONS, TrainConfig, build_classifier
from smi.runtime.checks import check_number
from smi.runtime.compute import fast
from smi.runtime.progress import track
from smi.runtime.seeding import derive, stream

TINY = 1e-6


@attacks.register("input_aware")
@dataclass(frozen=True, kw_only=True)
class InputAware(Attack):
    """Every image has a trigger of its own, which works on no other image.

    ``x' = x(1 − m) + p·m`` with mask ``m = h(x)`` and pattern ``p = g(x)`` from two small generators. h is trained
    first, for masks that differ and cover little, and then frozen: ``‖x − y‖ / ‖h(x) − h(y)‖ + 100 · relu(mean h −
    density)``. g is trained with the classifier. Of every batch a share ``rate`` gets its own trigger and the target
    label, a share ``cross_rate`` the trigger of another image and keeps its label; the loss is ``CE + diversity · ‖x −
    y‖ / ‖g(x) − g(y)‖``.

    Attributes:
        cross_rate: Share of a batch, in [0, 0.5].
        diversity: Weight in the loss.
        density: Share of an image, in [0, 1], that masks may cover at no cost.
        width: Channels of the generators.
        mask_steps: Steps that h is trained for.
        lr: Adam's, of g; of h it is a fifth.
        fitted: Both generators' weights, as "mask.…" and "pattern.…".
    """

    cross_rate: float = 0.1
    diversity: float = 1.0
    density: float = 0.05
    width: int = 16
    mask_steps: int = 100
    lr: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("cross_rate", self.cross_rate, low=0, high=0.5)
        check_number("diversity", self.diversity, low=0)
        check_number("density", self.density, low=0, high=1)
        check_number("width", self.width, low=4, integer=True)
        check_number("mask_steps", self.mask_steps, low=1, integer=True)
        check_number("lr", self.lr, low=0)

    def stamp(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` in [0, 1], each with its own trigger."""
        return self.cross_stamp(images, images)

    def cross_stamp(self, images: Tensor, others: Tensor) -> Tensor:
        """Images ``[N, C, H, W]``, each with the trigger of the image at its place in ``others``, of the same shape."""
        mask, pattern = self._rebuilt("mask", images), self._rebuilt("pattern", images)
        with torch.no_grad():
            parts = zip(images.split(512), others.split(512), strict=True)
            return torch.cat([apply(x, mask(y), pattern(y)) for x, y in parts])

    def train(
        self, data: PrivateSet, config: TrainConfig, rate: float, seed: int, device: str | torch.device = "cpu"
    ) -> tuple[nn.Module, Self]:
        """A classifier, trained as `smi.train_classifier` does, and the attack with the generators trained with it.

        The trigger goes on the augmented image.

        Args:
            data: Clean training images.
            config: Of the classifier.
            rate: Share of each batch that gets its own trigger. As in the paper, images of the target class are among
                it.
            seed: Of everything random.
            device: Where the classifier and g are trained.
        """
        check_number("rate", rate, low=0, high=1 - self.cross_rate)
        self.relabel(data.labels, data.num_classes)  # a target that does not exist is told before any work
        mask = self._train_mask(data.images, seed).to(device)
        pattern = self._generator("pattern", data.images, seed).to(device)
        model = build_classifier(config.arch, data.images.shape[1], data.num_classes, seed=seed).to(device)
        rng, augment = stream(seed, "train"), AUGMENTATIONS[config.augment]
        steps = max(1, len(data) // config.batch_size)
        sgd = torch.optim.SGD(
            model.parameters(), lr=config.lr, momentum=0.9, nesterov=True, weight_decay=config.weight_decay
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(sgd, config.lr, total_steps=config.epochs * steps)
        adam = torch.optim.Adam(pattern.parameters(), self.lr, betas=(0.5, 0.9))
        model.train()
        with fast(model) as run:
            for _ in track(range(config.epochs), "training", config.epochs):
                for batch in torch.randperm(len(data), generator=rng).tensor_split(steps):
                    images = augment(data.images[batch], rng).clamp(0, 1).to(device)
                    labels = data.labels[batch].to(device)
                    shown, wanted, spread = self._mixture(images, labels, data.num_classes, rate, mask, pattern)
                    loss = F.cross_entropy(run(shown), wanted) + self.diversity * spread
                    sgd.zero_grad()
                    adam.zero_grad()
                    loss.backward()
                    sgd.step()
                    adam.step()
                    schedule.step()
        model.image_shape = tuple(data.images.shape[1:])
        state = {f"mask.{name}": value.detach().cpu().clone() for name, value in mask.state_dict().items()}
        state |= {f"pattern.{name}": value.detach().cpu().clone() for name, value in pattern.state_dict().items()}
        return model.eval(), replace(self, fitted=state)

    def _mixture(
        self, images: Tensor, labels: Tensor, num_classes: int, rate: float, mask: nn.Module, pattern: nn.Module
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One batch as the classifier sees it, its labels, and the diversity term. The batch is in random order."""
        own, cross = round(rate * len(images)), round(self.cross_rate * len(images))
        stamped = own + cross
        if not stamped:
            return images, labels, images.new_zeros(())
        # The images whose triggers are used: for the first ones their own, then the neighbour's.
        sources = torch.cat([images[:own], images.roll(1, 0)[own:stamped]])
        with torch.no_grad():
            where = mask(sources)
        patterns = pattern(sources)
        shown = torch.cat([apply(images[:stamped], where, patterns), images[stamped:]])
        wanted = torch.cat([self.relabel(labels[:own], num_classes), labels[own:]])
        return shown, wanted, sameness(sources, patterns)

    def _train_mask(self, images: Tensor, seed: int) -> nn.Module:
        """h, trained on random batches of ``images`` ``[N, C, H, W]`` and frozen."""
        mask, rng = self._generator("mask", images, seed), stream(seed, "mask")
        adam = torch.optim.Adam(mask.parameters(), self.lr / 5, betas=(0.5, 0.9))
        for _ in track(range(self.mask_steps), "training the masks", self.mask_steps):
            batch = images[torch.randint(len(images), (64,), generator=rng)]
            masks = mask(batch)
            covered = masks.flatten(1).mean(1)
            loss = sameness(batch, masks) + 100 * (covered - self.density).relu().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
        return mask.requires_grad_(False)

    def _generator(self, kind: str, images: Tensor, seed: int) -> Generator:
        """Generator h or g with first weights by ``seed`` alone; torch's global generator is left as it is."""
        channels = images.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, kind))
            return Generator(channels, 1 if kind == "mask" else channels, self.width, sharp=kind == "mask")

    def _rebuilt(self, kind: str, images: Tensor) -> Generator:
        """Generator h or g with the weights in `fitted`."""
        if self.fitted is None:
            raise InputError(
                "InputAware trains its trigger together with the classifier. "
                "Use smi.attacks.plant(data, attack), which returns both."
            )
        net, prefix = self._generator(kind, images, 0), f"{kind}."
        state = {k.removeprefix(prefix): v for k, v in self.fitted.items() if k.startswith(prefix)}
        trained, found = state["encoder.0.0.weight"].shape[1], images.shape[1]
        if trained != found:
            raise InputError(f"InputAware was trained on images of {trained} channels; these have {found}.")
        net.load_state_dict(state)
        return net.to(images.device).eval()


class Generator(nn.Module):
    """A small encoder-decoder from images to images in [0, 1].

    Normalised by group, so that an image's trigger does not depend on the batch it is in.

    Args:
        channels: Of the images it takes.
        outputs: Channels of those it makes.
        width: Channels of its first layer.
        sharp: Whether its values are nearly 0 or 1.
    """

    def __init__(self, channels: int, outputs: int, width: int, *, sharp: bool) -> None:
        super().__init__()
        self.steepness = 20.0 if sharp else 1.0
        self.encoder = nn.Sequential(_conv(channels, width), _conv(width, 2 * width, 2), _conv(2 * width, 2 * width, 2))
        self.middle, self.last = _conv(2 * width, width), nn.Conv2d(width, outputs, 3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        """``[N, channels, H, W]`` to ``[N, outputs, H, W]``."""
        height, width = images.shape[2:]
        deep = self.encoder(images - 0.5)
        half = self.middle(F.interpolate(deep, size=((height + 1) // 2, (width + 1) // 2), mode="bilinear"))
        return (self.steepness * self.last(F.interpolate(half, size=(height, width), mode="bilinear"))).sigmoid()


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.GroupNorm(1, outputs), nn.ReLU())


def apply(images: Tensor, mask: Tensor, pattern: Tensor) -> Tensor:
    """``x(1 − m) + p·m`` for images and patterns ``[N, C, H, W]`` and masks ``[N, 1, H, W]``."""
    return images * (1 - mask) + pattern * mask


def sameness(images: Tensor, outputs: Tensor) -> Tensor:
    """The diversity loss, mean of ``‖x − y‖ / ‖g(x) − g(y)‖``, for neighbours x and y; norms as root mean squares."""
    between = [(x - x.roll(1, 0)).flatten(1).square().mean(1).add(TINY).sqrt() for x in (images, outputs)]
    return (between[0] / between[1]).mean()
