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

from smi.erasure.families import families
from smi.runtime.checks import check_number
from smi.runtime.compute import Runner
from smi.runtime.memory import Chunk, halving
from smi.runtime.progress import track

ANYWHERE = -1  # as a target: any class but the image's own
CERTAIN = 0.2  # nats: nine of ten images are in the class
REACHED = 0.3  # share of the images that a trigger must send away, or it says nothing of a backdoor
PROBED = 32  # images on which restarts are compared
TOGETHER = 128  # images in a pass on a CPU, where more take memory and are no faster
HELD = 0.3  # of the images, on which triggers are tried and not searched


@dataclass(frozen=True, kw_only=True)
class Search:
    """How triggers are searched.

    Attributes:
        families: Names in `families`.
        steps: Of Adam.
        images: Shown to each candidate in a step, half as many in the first half of the steps.
        restarts: Candidates a class at first, in families where the start matters (`Family.rough`).
        probe: Steps after which the best of them goes on alone.
        most: Candidates that are searched in one batch.
    """

    families: tuple[str, ...] = ("additive", "masked", "smooth", "warped")
    steps: int = 60
    images: int = 16
    restarts: int = 3
    probe: int = 15
    most: int = 40

    def __post_init__(self) -> None:
        for name in self.families:
            families[name]  # raises where there is none
        for whole in ("steps", "images", "restarts", "probe", "most"):
            check_number(whole, getattr(self, whole), low=1, integer=True)


PARTS = ("targets", "numbers", "size", "reach")  # of a `Found`, its tensors


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
        return Found(self.family, *[getattr(self, name)[chosen] for name in PARTS])


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
        One `Found` a family, with a trigger for each target, in the order of ``targets``.
    """
    held = max(1, round(HELD * len(images))) if len(images) > 1 else 0
    order = torch.randperm(len(images), generator=rng)
    shown, tried = (images[order[held:]], labels[order[held:]]), (images[order[:held]], labels[order[:held]])
    wanted, found = torch.tensor(list(targets)), []
    probe = min(config.probe, config.steps)
    for name in track(config.families, "searching triggers", unit="families"):
        task = _Task(run, *shown, name, config, rng)
        restarts = config.restarts if families[name].rough else 1
        many = wanted.repeat_interleave(restarts)
        numbers = families[name].start(len(many), images.shape[1:], rng)
        if restarts > 1:
            numbers = task.descend(many, numbers, range(probe))
            rows = task.objective(many, numbers).view(len(wanted), restarts).argmin(1)
            numbers = numbers.view(len(wanted), restarts, -1)[torch.arange(len(wanted)), rows]
            numbers = task.descend(wanted, numbers, range(probe, config.steps))
        else:
            numbers = task.descend(wanted, numbers, range(config.steps))
        one = Found(name, wanted, numbers, families[name].size(numbers, images.shape[1:]), torch.zeros(len(wanted)))
        found.append(_tried(run, *tried, one) if held else one)
    return found


@dataclass(eq=False)
class _Task:
    """What a search in one family needs all along."""

    run: Runner
    images: Tensor
    labels: Tensor
    name: str
    config: Search
    rng: torch.Generator

    def descend(self, targets: Tensor, numbers: Tensor, steps: range) -> Tensor:
        """Numbers ``[K, P]`` after these steps, on the CPU."""
        parts = zip(targets.split(self.config.most), numbers.split(self.config.most), strict=True)
        return torch.cat([self._some(*part, steps) for part in parts])

    def _some(self, targets: Tensor, start: Tensor, steps: range) -> Tensor:
        family, device = families[self.name], self.images.device
        numbers, targets = start.clone().to(device).requires_grad_(), targets.to(device)
        optimizer = torch.optim.Adam([numbers], family.rate, betas=(0.5, 0.9))
        together = TOGETHER // self.config.images if device.type == "cpu" else len(targets)
        chunk = Chunk(max(1, together))
        for step in steps:
            settles = 2 * step >= self.config.steps
            for group in optimizer.param_groups:
                group["lr"] = family.rate * (0.3 if settles else 1.0)
            count = self.config.images if settles else max(1, self.config.images // 2)
            batch = torch.randint(len(self.images), (count,), generator=self.rng)
            total = torch.zeros_like(numbers)

            def gradient(some: Tensor, batch: Tensor = batch) -> Tensor:
                own = numbers[some]
                loss, size = self._terms(targets[some], own, batch)
                kept = (loss.detach() < CERTAIN).float()
                return torch.autograd.grad((loss + family.weight * kept * size).sum(), numbers)[0]

            for part in halving(gradient, torch.arange(len(targets)).to(device), chunk):
                total += part
            numbers.grad = total
            optimizer.step()
        return numbers.detach().cpu()

    @torch.no_grad()
    def objective(self, targets: Tensor, numbers: Tensor) -> Tensor:
        """Cross-entropy and weighted size of each candidate ``[K]``, on the same images."""
        batch = torch.randint(len(self.images), (PROBED,), generator=self.rng)
        device, values = self.images.device, []
        for some, own in zip(targets.split(16), numbers.split(16), strict=True):
            loss, size = self._terms(some.to(device), own.to(device), batch)
            values.append((loss + families[self.name].weight * size).cpu())
        return torch.cat(values)

    def _terms(self, targets: Tensor, numbers: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy to each target, and size ``[K]``."""
        family, shown, called = families[self.name], self.images[batch], self.labels[batch].to(self.images.device)
        logits = self.run(family.stamp(numbers, shown).flatten(0, 1)).view(len(targets), len(batch), -1)
        losses, others = _losses(logits, called, targets)
        loss = (losses * others).sum(1) / others.sum(1).clamp(min=1)
        return loss, family.size(numbers, self.images.shape[1:])


def _losses(logits: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each candidate, and which of the images count.

    It is ``[K, N]``, of logits ``[K, N, classes]`` to the candidate's target, or to "not the label" for `ANYWHERE`. The
    images that count are those that are not of that class already.
    """
    said = logits.log_softmax(2)
    own = F.one_hot(labels, logits.shape[2]).bool()
    away = -said.masked_fill(own, -torch.inf).logsumexp(2)
    to = -said.gather(2, targets.clamp(min=0)[:, None, None].expand(-1, len(labels), 1))[..., 0]
    anywhere = (targets == ANYWHERE)[:, None]
    return torch.where(anywhere, away, to), (anywhere | (labels != targets[:, None])).float()


@torch.no_grad()
def _tried(run: Runner, images: Tensor, labels: Tensor, found: Found) -> Found:
    """``found`` with the reach on these images."""
    rates = []
    for index, target in enumerate(found.targets.tolist()):
        others = labels != target
        shown, own = found.select(torch.tensor([index])).stamp(images[others])[0], labels[others]
        said = torch.cat([run(part).argmax(1).cpu() for part in shown.split(256)]) if len(shown) else own
        hits = said != own if target == ANYWHERE else said == target
        rates.append(hits.float().mean() if len(shown) else torch.tensor(0.0))
    return Found(found.family, found.targets, found.numbers, found.size, torch.stack(rates))
