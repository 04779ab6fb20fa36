"""A little tuning after directions were erased: found triggers keep their image's label, all else stays.

A trigger that is found is not quite the one that was planted. Where the planted one moves the features far, what the
found direction misses of it is still enough to fool; a few steps of training on stamped samples take that away. The
teacher on public images is the *erased* model: the suspect's answers would bring the direction back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.checks import check_number, device_of
from smi.compute import fast, frozen
from smi.domains.base import PublicImages, Samples
from smi.erasure.families import families
from smi.erasure.search import Found


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Attributes:
    steps: Of SGD.
    lr: Its rate.
    momentum: Its momentum.
    clip: Largest L2 norm of a step's gradient. Stamped images begin with a loss of ten and more.
    batch_size: Samples a step, and as many public images.
    stamped: Share in [0, 1] of the samples that carry a found trigger.
    distill: Weight of ``KL(erased ‖ tuned)`` on public images.
    """

    steps: int = 30
    lr: float = 0.002
    momentum: float = 0.9
    clip: float = 1.0
    batch_size: int = 64
    stamped: float = 0.5
    distill: float = 5.0

    def __post_init__(self) -> None:
        for whole in ("steps", "batch_size"):
            check_number(whole, getattr(self, whole), low=1, integer=True)
        for rate in ("lr", "clip", "distill"):
            check_number(rate, getattr(self, rate), low=0)
        check_number("momentum", self.momentum, low=0, high=1)
        check_number("stamped", self.stamped, low=0, high=1)


def tune(
    model: nn.Module,
    samples: Samples,
    public: PublicImages | None,
    found: Sequence[Found],
    config: Tuning,
    rng: torch.Generator,
) -> list[float]:
    """Tune ``model`` in place, in eval mode throughout: BatchNorm keeps its statistics.

    Args:
        model: The erased model.
        samples: Labelled images.
        public: Unlabelled ones, on which the erased model is the teacher; None for no distillation.
        found: The triggers that were erased.
        config: See `Tuning`.
        rng: Draws batches and triggers.

    Returns:
        The loss of each step.
    """
    teacher, device = frozen(model), device_of(model)
    optimizer = torch.optim.SGD(model.parameters(), config.lr, momentum=config.momentum)
    curve = []
    with fast(model) as run:
        for _ in range(config.steps):
            chosen = torch.randint(len(samples), (config.batch_size,), generator=rng)
            images, labels = samples.images[chosen], samples.labels[chosen]
            count = round(config.stamped * len(images)) if found else 0
            images = torch.cat([stamped(images[:count], labels[:count], found, rng), images[count:]])
            loss = F.cross_entropy(run(images.to(device)), labels.to(device))
            if public is not None and config.distill:
                drawn = public.images[torch.randint(len(public), (config.batch_size,), generator=rng)]
                shown = vary(drawn.to(device), rng)
                with torch.no_grad(), fast(teacher) as asked:
                    wanted = F.log_softmax(asked(shown), 1)
                said = F.log_softmax(run(shown), 1)
                loss = loss + config.distill * F.kl_div(said, wanted, reduction="batchmean", log_target=True)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip)
            optimizer.step()
            curve.append(loss.item())
    return curve


@torch.no_grad()
def stamped(images: Tensor, labels: Tensor, found: Sequence[Found], rng: torch.Generator) -> Tensor:
    """Each image with one of the triggers, drawn at random of those that would send it to another class."""
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
