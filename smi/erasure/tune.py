"""Tuning: a model learns to say of changed images what it says of them unchanged.

Two kinds of changes. Those that were found: the triggers to the treated classes, for a trigger that is found is not
quite the one that was planted, and where the planted one moves the features far, what the found direction misses of it
is still enough to fool. And random ones of every kind that is searched for (`Family.change`), which nobody had to find:
many a backdoor is a narrow response to a pattern, and a model that is held to its own answers under patterns of all
sorts loses it. The teacher is the model as it was before the first step, so an *erased* one: the suspect's answers
would bring the direction back. No label is needed, and images of any kind will do.

Kin: Zheng et al., "Improving the Robustness of Deep Neural Networks via Stability Training", CVPR 2016, which holds a
classifier to its own answers under white noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.domains.augment import jitter
from smi.domains.base import PublicImages, Samples
from smi.erasure.families import changed, families
from smi.erasure.search import Found
from smi.runtime.checks import check_number, device_of
from smi.runtime.compute import fast, frozen
from smi.runtime.job import Job, Loop


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """How a model is tuned.

    Attributes:
        steps: Of SGD. Its rate falls linearly to nothing.
        lr: Its rate at first.
        momentum: Its momentum.
        clip: Largest L2 norm of a step's gradient.
        batch_size: Images a step, half of them public where there are any. Each is shown unchanged and changed.
        found: Share in [0, 1] of the changes that are found triggers, where there are any. The others are random.
        still: Weight of the unchanged images, that of the changed ones being 1.
    """

    steps: int = 600
    lr: float = 0.03
    momentum: float = 0.9
    clip: float = 1.0
    batch_size: int = 32
    found: float = 0.25
    still: float = 3.0

    def __post_init__(self) -> None:
        for whole in ("steps", "batch_size"):
            check_number(whole, getattr(self, whole), low=1, integer=True)
        for rate in ("lr", "clip", "still"):
            check_number(rate, getattr(self, rate), low=0)
        check_number("momentum", self.momentum, low=0, high=1)
        check_number("found", self.found, low=0, high=1)


def tune(
    model: nn.Module,
    samples: Samples,
    public: PublicImages | None,
    found: Sequence[Found],
    config: Tuning,
    rng: torch.Generator,
    job: Job,
    *,
    name: str = "tuning",
) -> list[float]:
    """Tune ``model`` in place, in eval mode throughout: BatchNorm keeps its statistics.

    Args:
        model: The erased model, or any other.
        samples: Images of its classes. Their labels are not used.
        public: Public images, or None.
        found: Triggers to the treated classes; none will do.
        config: See `Tuning`.
        rng: Draws batches, triggers and changes.
        job: From whose state it goes on.
        name: Of this tuning, where the job has more than one.

    Returns:
        The loss of each step.
    """
    teacher, device = frozen(model), device_of(model)
    pools = [samples.images] if public is None else [samples.images, public.images]
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum)
    weights = torch.tensor([config.still, 1.0]) / (1 + config.still)
    curve = list[float]()
    with fast(model) as run, fast(teacher) as asked:

        def one_step(step: int) -> None:
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 - step / config.steps)
            images = jitter(_drawn(pools, config.batch_size, rng), rng)
            with torch.no_grad():
                wanted = F.log_softmax(asked(images.to(device)), 1)
            other = _changed(images, wanted.argmax(1).cpu(), found, config, rng)
            said = F.log_softmax(run(torch.cat([images, other]).to(device)), 1)
            off = F.kl_div(said, torch.cat([wanted, wanted]), reduction="none", log_target=True).sum(1)
            loss = (off.view(2, -1).mean(1) * weights.to(device)).sum()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            curve.append(loss.item())

        Loop(
            name=name, rounds=config.steps, trained=model.state_dict(), optimizer=optimizer, generators=[rng],
            curves={"loss": curve}, shows="tuning",
        ).run(job, one_step)  # fmt: skip
    return curve


def _drawn(pools: Sequence[Tensor], count: int, rng: torch.Generator) -> Tensor:
    """``count`` images, about as many of each pool, in no order."""
    shares = torch.arange(count).tensor_split(len(pools))
    pairs = zip(pools, shares, strict=True)
    drawn = [pool[torch.randint(len(pool), (len(some),), generator=rng)] for pool, some in pairs]
    return torch.cat(drawn)[torch.randperm(count, generator=rng)]


def _changed(images: Tensor, labels: Tensor, found: Sequence[Found], config: Tuning, rng: torch.Generator) -> Tensor:
    """Every image under a found trigger or a random change."""
    count = round(config.found * len(images)) if any(len(one.targets) for one in found) else 0
    other = changed(images[count:], rng)
    return torch.cat([stamped(images[:count], labels[:count], found, rng), other])


@torch.no_grad()
def stamped(images: Tensor, labels: Tensor, found: Sequence[Found], rng: torch.Generator) -> Tensor:
    """Each image with one of the triggers, drawn at random of those that would send it to another class."""
    if not len(images):
        return images
    targets = torch.cat([one.targets for one in found])
    places = [(family, index) for family, one in enumerate(found) for index in range(len(one.targets))]
    out = images.clone()
    for row, label in enumerate(labels.tolist()):
        other = (targets != label).nonzero()[:, 0]
        if len(other):
            family, index = places[int(other[torch.randint(len(other), (1,), generator=rng)])]
            one = found[family]
            out[row] = families[one.family].stamp(one.numbers[index : index + 1], images[row : row + 1])[0, 0]
    return out
