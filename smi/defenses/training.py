"""The training loop that defenses of this project share: AdamW on the samples as they are, BatchNorm in eval mode.

Papers' fine-tuning is another recipe: `smi.defenses.sgd`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.runtime.checks import check_number, device_of
from smi.runtime.compute import Runner, fast, unfrozen
from smi.runtime.job import Job, Loop
from smi.runtime.memory import halved
from smi.runtime.unfinished import restore, states

LARGEST_STEP = 0.7  # of the weights' size, over all layers together

LEAST_STEPS = 3  # a round: with fewer samples smaller batches, or the decay comes before the repair is done

StepLoss = Callable[[Runner, Tensor, Tensor], Tensor]
AfterStep = Callable[[nn.Module], None]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The outer loop that defenses share: AdamW with cosine decay over ``rounds`` passes over the samples.

    Attributes:
        rounds: Passes over the samples.
        lr: Its rate, lower for large models, see `capped_rate`.
        batch_size: Samples a step, fewer where a round would have less than three steps.
        weight_decay: AdamW's.
        distill: Weight of ``KL(suspect ‖ repaired)`` on the samples and on as many public images a step; 0 switches it
            off.
    """

    rounds: int = 30
    lr: float = 1e-3
    batch_size: int = 100
    weight_decay: float = 0.01
    distill: float = 0.0

    def __post_init__(self) -> None:
        check_number("rounds", self.rounds, low=1, integer=True)
        check_number("batch_size", self.batch_size, low=2, integer=True)
        check_number("lr", self.lr, low=0)
        check_number("distill", self.distill, low=0)


def train_repair(
    model: nn.Module,
    samples: Samples,
    schedule: Schedule,
    loss: StepLoss,
    job: Job,
    *,
    after_step: AfterStep | None = None,
    moving: Sequence[torch.Generator] = (),
) -> tuple[nn.Module, list[float]]:
    """Minimise ``loss`` on shuffled batches, in eval mode throughout.

    Samples stay on the CPU; a step's go to where the model is. Eval mode keeps BatchNorm statistics, which a few
    hundred samples would spoil.

    Args:
        model: Left as it is.
        samples: With labels.
        schedule: See `Schedule`.
        loss: Of a step: ``loss(run, images, labels)``, a mean over the images.
        job: Its seed gives the order of the samples; the loop goes on from its state, and tells its observer.
        after_step: Is called with the model after each step.
        moving: The random generators of ``loss``.

    Returns:
        The repaired copy and the mean loss of each round.
    """
    repaired, rng, curve = unfrozen(model), job.rng("repair"), list[float]()
    lr = capped_rate(repaired, schedule.lr)
    optimizer = torch.optim.AdamW(repaired.parameters(), lr, weight_decay=schedule.weight_decay)
    steps = min(max(LEAST_STEPS, len(samples) // schedule.batch_size), len(samples))
    rate, step = _warm_cosine(schedule.rounds * steps), _Step(samples, loss, optimizer, device_of(model), moving)

    def one_round(index: int) -> None:
        total = 0.0
        with fast(repaired) as run:
            for number, batch in enumerate(_batches(len(samples), steps, rng), index * steps):
                for group in optimizer.param_groups:
                    group["lr"] = lr * rate(number)
                total += step.backward(run, batch)
                optimizer.step()
                if after_step is not None:
                    after_step(repaired)
        curve.append(total / steps)

    loop = Loop(
        name="training", rounds=schedule.rounds, trained=repaired.state_dict(), optimizer=optimizer,
        generators=[rng, *moving], curves={"loss": curve},
    )  # fmt: skip
    loop.run(job, one_round, partial(job.on_round, repaired))
    return repaired, curve


@dataclass(eq=False)
class _Step:
    """The gradients of a step, in as many pieces as the memory asks for."""

    samples: Samples
    loss: StepLoss
    optimizer: torch.optim.Optimizer
    device: torch.device
    moving: Sequence[torch.Generator]
    pieces: int = 1

    def backward(self, run: Runner, batch: Tensor) -> float:
        """Leave them with the parameters. Returns the loss."""
        before = states(self.moving)
        while True:
            try:
                return self._backward(run, batch)
            except (RuntimeError, MemoryError) as error:
                if len(batch) // (2 * self.pieces) < 2:
                    raise
                halved(error, len(batch) // self.pieces)
                self.pieces *= 2
                restore(self.moving, before)  # what the attempt drew

    def _backward(self, run: Runner, batch: Tensor) -> float:
        self.optimizer.zero_grad()
        total = 0.0
        for piece in batch.tensor_split(min(self.pieces, max(1, len(batch) // 2))):  # two samples at least
            images, labels = (of[piece].to(self.device) for of in (self.samples.images, self.samples.labels))
            value = self.loss(run, images, labels) * (len(piece) / len(batch))
            value.backward()
            total += value.item()
        return total


def capped_rate(model: nn.Module, lr: float) -> float:
    """``lr``, or as much less as the model needs so that one step of Adam does not undo what it has learned.

    Such a step moves each weight by about ``lr``, a layer by that share of its weights' root mean square, and what the
    model computes by up to the sum of these shares: 0.4 for five convolutions of a few dozen channels at 0.003, 3.5 for
    ResNet-18. The sum is kept to `LARGEST_STEP`.
    """
    sizes = [p.detach().float().square().mean().sqrt().item() for p in model.parameters() if p.ndim > 1]
    step = sum(lr / size for size in sizes if size)
    return lr * min(1.0, LARGEST_STEP / step) if step else lr


def _warm_cosine(total: int) -> Callable[[int], float]:
    """Linear warm-up over a tenth of the steps, then cosine decay to zero."""
    warm = max(1, total // 10)
    return lambda step: min(
        (step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm) / max(1, total - warm))
    )


def _batches(n: int, steps: int, rng: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(n, generator=rng).tensor_split(steps)
