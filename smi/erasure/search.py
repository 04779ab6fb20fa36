"""One search for triggers: all classes at once, in every family.

For each class a trigger of each family is sought that sends images of all other classes there and takes as little of
them as it can. Adam minimises the cross-entropy to the class, plus the trigger's size wherever that cross-entropy is
below `CERTAIN`: so the size settles where the class is just reached. All candidates are searched in one batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.checks import check_number
from smi.compute import Runner
from smi.erasure.families import families
from smi.memory import Chunk, halving

CERTAIN = 0.7  # nats: about half of the images are in the class
HELD = 0.3  # of the images, on which triggers are tried and not searched


@dataclass(frozen=True, kw_only=True)
class Search:
    """How triggers are searched.

    Attributes:
        families: Names in `families`.
        steps: Of Adam.
        images: Shown to each candidate in a step.
        restarts: Candidates a class and family.
        most: Candidates that are searched in one batch.
    """

    families: tuple[str, ...] = ("additive", "masked", "smooth", "warped")
    steps: int = 50
    images: int = 16
    restarts: int = 2
    most: int = 40

    def __post_init__(self) -> None:
        for name in self.families:
            families[name]  # raises where there is none
        for whole in ("steps", "images", "restarts", "most"):
            check_number(whole, getattr(self, whole), low=1, integer=True)


@dataclass(frozen=True, eq=False)
class Found:
    """The triggers of one family.

    Attributes:
        family: Its name.
        targets: Class that each is to reach ``[K]``.
        numbers: The triggers ``[K, P]``, as the family writes them.
        size: In the family's unit ``[K]``.
        reach: Share in [0, 1] of the held-out images of other classes that each sends to its class ``[K]``.
    """

    family: str
    targets: Tensor
    numbers: Tensor
    size: Tensor
    reach: Tensor

    def stamp(self, images: Tensor) -> Tensor:
        """Every image under every trigger: ``[K, N, C, H, W]``."""
        return families[self.family].stamp(self.numbers.to(images.device), images)

    def select(self, chosen: Tensor) -> Found:
        """Those at ``chosen``."""
        parts = (part[chosen] for part in (self.targets, self.numbers, self.size, self.reach))
        return Found(self.family, *parts)


def search(
    run: Runner,
    images: Tensor,
    labels: Tensor,
    targets: Sequence[int],
    config: Search,
    rng: torch.Generator,
) -> list[Found]:
    """Triggers of every family for every target class.

    Args:
        run: The model, without gradients of its own weights.
        images: ``[N, C, H, W]`` in [0, 1], where the model runs.
        labels: ``[N]``, what they are.
        targets: Classes to reach.
        config: See `Search`.
        rng: Draws starts and batches.

    Returns:
        One `Found` a family, with ``restarts`` triggers for each target, in the order of ``targets``.
    """
    held = max(1, round(HELD * len(images))) if len(images) > 1 else 0
    order = torch.randperm(len(images), generator=rng)
    wanted = torch.tensor(list(targets)).repeat_interleave(config.restarts)
    found = []
    for name in config.families:
        numbers = families[name].start(len(wanted), images.shape[1:], rng)
        parts = [
            _descend(run, images[order[held:]], labels[order[held:]], name, some, start, config, rng)
            for some, start in zip(wanted.split(config.most), numbers.split(config.most), strict=True)
        ]
        final = torch.cat(parts)
        size = families[name].size(final, images.shape[1:])
        one = Found(name, wanted, final, size, torch.zeros(len(wanted)))
        found.append(_tried(run, images[order[:held]], labels[order[:held]], one) if held else one)
    return found


def _descend(
    run: Runner,
    images: Tensor,
    labels: Tensor,
    name: str,
    targets: Tensor,
    start: Tensor,
    config: Search,
    rng: torch.Generator,
) -> Tensor:
    """The numbers ``[K, P]`` of triggers after all steps, on the CPU."""
    family, device, shape = families[name], images.device, images.shape[1:]
    numbers, targets = start.clone().to(device).requires_grad_(), targets.to(device)
    optimizer = torch.optim.Adam([numbers], family.rate, betas=(0.5, 0.9))
    chunk = Chunk(len(targets))
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = family.rate * (1.0 if 2 * step < config.steps else 0.3)  # the last steps settle
        batch = torch.randint(len(images), (config.images,), generator=rng)
        shown, called = images[batch], labels[batch].to(device)
        optimizer.zero_grad()
        total = torch.zeros_like(numbers)

        def gradient(some: Tensor, shown: Tensor = shown, called: Tensor = called) -> Tensor:
            own = numbers[some]
            stamped = family.stamp(own, shown)
            wanted = targets[some, None].expand(-1, len(shown))
            losses = F.cross_entropy(run(stamped.flatten(0, 1)), wanted.flatten(), reduction="none").view(len(some), -1)
            others = (called != targets[some, None]).float()
            loss = (losses * others).sum(1) / others.sum(1).clamp(min=1)
            kept = (loss.detach() < CERTAIN).float()
            return torch.autograd.grad((loss + family.weight * kept * family.size(own, shape)).sum(), numbers)[0]

        for part in halving(gradient, torch.arange(len(targets), device=device), chunk):
            total += part
        numbers.grad = total
        optimizer.step()
    return numbers.detach().cpu()


@torch.no_grad()
def _tried(run: Runner, images: Tensor, labels: Tensor, found: Found) -> Found:
    """``found`` with the reach on these images."""
    rates = []
    for index, target in enumerate(found.targets.tolist()):
        others = images[labels != target]
        shown = found.select(torch.tensor([index])).stamp(others)[0]
        hits = [run(part).argmax(1) == target for part in shown.split(256)]
        rates.append(torch.cat(hits).float().mean().cpu() if len(others) else torch.tensor(0.0))
    return Found(found.family, found.targets, found.numbers, found.size, torch.stack(rates))
