"""A student: a fresh model of the suspect's architecture that is taught what the suspect says of unstamped images.

It learns the task, and what is easy in it: a few strokes make an 8 of any digit. Nothing tells it of the trigger. So it
is the yardstick for how easily a class is reached. Labels alone are taught: the suspect's small probabilities would
hand the backdoor on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.checks import check_number, device_of
from smi.compute import fast
from smi.memory import Chunk, halving
from smi.progress import track
from smi.seeding import derive, stream

Draw = Callable[[int], Tensor]
"""Gives so many unstamped images ``[N, C, H, W]`` in [0, 1], afresh each time."""


@dataclass(frozen=True, kw_only=True)
class Lessons:
    """How a student is taught.

    Attributes:
        steps: Of AdamW, with cosine decay.
        batch_size: Images a step.
        lr: Learning rate at the beginning.
    """

    steps: int = 200
    batch_size: int = 96
    lr: float = 3e-3

    def __post_init__(self) -> None:
        check_number("steps", self.steps, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=1, integer=True)
        check_number("lr", self.lr, low=0)


def teach(
    suspect: nn.Module,
    draw: Draw,
    lessons: Lessons = Lessons(),
    *,
    goes_on: Callable[[nn.Module], bool] = lambda student: True,
    seed: int = 0,
) -> nn.Module:
    """The student, in eval mode. Only labels that the suspect gives to an image and to its variation are taught.

    Args:
        suspect: The model that is asked, frozen.
        draw: See `Draw`.
        lessons: See `Lessons`.
        goes_on: Asked after a quarter of the steps, with the student, whether more are worth while.
        seed: Of its first weights, of the variations and of dropout.
    """
    with _seeded(seed, "fresh", device_of(suspect)):
        student = fresh(suspect)
    rng = stream(seed, "lessons")
    optimizer = torch.optim.AdamW(student.parameters(), lessons.lr)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, lessons.steps)
    student.train()
    with fast(student) as run, fast(suspect) as ask, _seeded(seed, "dropout", device_of(suspect)):
        for step in track(range(lessons.steps), "teaching a student"):
            if step == lessons.steps // 4 and not goes_on(student):
                break
            plain = draw(lessons.batch_size).to(device_of(suspect))
            varied = vary(plain, rng)
            with torch.no_grad():
                said = torch.cat(list(halving(ask, torch.cat([plain, varied]), Chunk(2 * len(plain))))).argmax(1)
            before, labels = said.split(len(plain))
            losses = F.cross_entropy(run(varied), labels, reduction="none")
            trusted = (before == labels).float()
            optimizer.zero_grad()
            ((losses * trusted).sum() / trusted.sum().clamp(min=1)).backward()
            optimizer.step()
            decay.step()
    return student.eval().requires_grad_(False)


@contextmanager
def _seeded(seed: int, name: str, device: torch.device) -> Iterator[None]:
    """Torch's own generators, which layers draw from, in a state that depends on the seed alone; put back after."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive(seed, name))
        yield


@torch.no_grad()
def fresh(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with new weights, as its layers begin; normalisation of images and the like stays."""
    renewed = copy.deepcopy(model).requires_grad_(True)
    for module in renewed.modules():
        own = dict(module.named_parameters(recurse=False))
        before = {name: weight.clone() for name, weight in own.items()}
        reset = getattr(module, "reset_parameters", None)
        if callable(reset):
            reset()
        for name, weight in own.items():  # of a layer that does not say how it begins, or not of all its weights
            spread = weight.std(correction=0)
            if torch.equal(weight, before[name]) and spread > 0:
                weight.copy_(torch.randn(weight.shape).to(weight) * spread + weight.mean())
    return renewed
