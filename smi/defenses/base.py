"""What a defense is: a suspect model and samples in, a repaired model out. It never sees private data or a trigger."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.augment import vary
from smi.checks import check_model, check_number, device_of
from smi.compute import Runner, asked_precision, fast, fingerprint_of, frozen, predict
from smi.detection import Detection
from smi.domains.base import PublicImages, Samples, check_public, check_samples
from smi.erasure.search import ANYWHERE, Found
from smi.files import fingerprint
from smi.memory import Chunk, halved, halving
from smi.seeding import stream
from smi.unfinished import (
    EVERY,
    Tensors,
    Unfinished,
    current,
    keeping,
    named,
    nothing_kept,
    optimizer_state,
    part,
    restore,
    restore_optimizer,
    states,
)
from smi_kernels import Registry


@dataclass(frozen=True, eq=False)
class Evidence:
    """What a removal saw that looks for triggers (`smi.defenses.Erasure`).

    Attributes:
        detection: The search on the suspect.
        treated: Classes whose triggers were erased, or `ANYWHERE` alone; none where nothing stood out.
        after: Triggers of those classes on the repaired model; empty for none.
        left: Treated classes that are still reached unusually easily.
        asked: Whether the caller said which classes to treat.
    """

    detection: Detection
    treated: list[int]
    after: list[Found]
    left: list[int]
    asked: bool = False

    def excess_after(self) -> list[float]:
        """The largest excess in any family that each of the treated classes has on the repaired model."""
        scan = self.detection.scan
        if self.treated == [ANYWHERE]:
            return [scan.excess_anywhere(self.after).max().item()]
        return scan.excess(self.after).amax(0).tolist() if self.after else []


@dataclass(frozen=True, eq=False)
class Repair:
    """The outcome of a removal.

    model: the repaired model, in eval mode. defense, source: names for tables. settings: what the defense ran with,
    what it chose itself included. log: curves and findings by name. delta: universal δ's found on the suspect model
    ``[T, C, H, W]``, where the defense looks for them. evidence: of an `Erasure`, what it saw.
    """

    model: nn.Module
    defense: str
    source: str
    settings: dict[str, Any]
    log: dict[str, Any] = field(default_factory=dict)
    delta: Tensor | None = None
    evidence: Evidence | None = None

    def __repr__(self) -> str:
        return f"Repair(by {self.defense} on {self.source} samples)"


@dataclass(frozen=True, kw_only=True)
class Defense:
    """Base of every defense. needs_samples: whether it looks at samples at all; `repair` hands None on where not."""

    name = "defense"
    needs_samples: ClassVar[bool] = True

    def repair(
        self,
        model: nn.Module,
        samples: Samples | None = None,
        public: PublicImages | None = None,
        *,
        seed: int = 0,
        checkpoint: str | Path | None = None,
        every: float = EVERY,
    ) -> Repair:
        """Repair a copy of ``model``; the model passed in is left as it is.

        samples: labelled images (`smi.invert` makes them), or None for a defense that needs none. public: unlabelled
        public images, on which the repaired model is held to the suspect model's own outputs where the defense distils.
        checkpoint: a file for the state, written after a round of training when ``every`` seconds have passed, and when
        Ctrl-C or SIGTERM end the work; where it exists, the repair goes on from it, to the same weights. Fine-tuning
        can do that, erasure once it has searched; other defenses begin again. Raises `InputError` for anything else, a
        `PrivateSet` or an attack above all.
        """
        if samples is None and not self.needs_samples:
            check_public(public, None)
            return self._repair(model, cast(Samples, samples), public, seed)  # which takes None there
        check_samples(samples, f"The defense {self.name!r}")
        samples = cast(Samples, samples)
        check_model(model, samples.images, samples.num_classes)
        check_public(public, samples.images.shape[1:])
        self.check_fits(model, samples.images[:2])
        if checkpoint is None:
            with keeping(nothing_kept()):  # also inside of another repair that keeps its state
                return self._repair(model, samples, public, seed)
        record = self.settings() | {"seed": seed, "model": fingerprint_of(model), "precision": asked_precision()}
        record |= {"images": fingerprint(samples.images), "labels": fingerprint(samples.labels)}
        record |= {"public": None if public is None else fingerprint(public.images)}
        with keeping(Unfinished(checkpoint, "removal", record, every=every)):
            return self._repair(model, samples, public, seed)

    def check_fits(self, model: nn.Module, images: Tensor) -> None:
        """Raise `InputError` where the defense cannot work on ``model``; asked before samples are made, too.

        images: one or more ``[N, C, H, W]`` that the model takes.
        """

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> Repair:
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """The configuration, for the record."""
        return {"defense": self.name} | asdict(self)


defenses: Registry[type[Defense]] = Registry("defense")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The outer loop that defenses share: AdamW with cosine decay over ``rounds`` passes over the samples.

    lr: its rate, lower for large models, see `bearable`. batch_size: samples a step, fewer where a round would have
    less than three steps. distill: weight of ``KL(suspect ‖ repaired)`` on the samples and on as many public images a
    step; 0 switches it off.
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


SURE = 0.5  # mean top probability from which public images say something about the suspect's clean behaviour


def recognised(model: nn.Module, public: PublicImages | None) -> PublicImages | None:
    """``public``, or None where the model recognises so little in it that holding its answers would hold a backdoor.

    That is where the mean probability of its top class is below `SURE`: its answers to such images are spread over many
    classes, each change of the weights moves them, and a removal that keeps them keeps all else as well. Seen on a
    43-class traffic sign model and photographs of other things (mean 0.4, digits beside digits 0.9). At most some
    thousand of the images are asked.
    """
    if public is None:
        return None
    asked = public.images[:: max(1, len(public) // 1000)]
    top = predict(model, asked).softmax(1).amax(1).mean().item()
    return public if top >= SURE else None


class Distillation:
    """``KL(suspect ‖ repaired)`` on samples and public images: what stands for accuracy where nobody has clean data.

    Both are varied by small affine maps and gammas, afresh each step. Public images count where the suspect has
    `recognised` them.
    """

    def __init__(self, model: nn.Module, public: PublicImages | None, rng: torch.Generator) -> None:
        self._teacher = frozen(model)
        self._public, self._rng = recognised(self._teacher, public), rng

    def __call__(self, run: Runner, images: Tensor) -> Tensor:
        """Scalar loss on ``images`` ``[N, C, H, W]`` and as many public ones."""
        if self._public is not None:
            extra = self._public.images[torch.randint(len(self._public), (len(images),), generator=self._rng)]
            images = torch.cat([images, extra.to(images.device)])
        images = vary(images, self._rng)
        wanted = F.log_softmax(ask(self._teacher, images), 1)
        return F.kl_div(F.log_softmax(run(images), 1), wanted, reduction="batchmean", log_target=True)


@torch.no_grad()
def ask(teacher: nn.Module, images: Tensor) -> Tensor:
    """What a frozen model says of images: logits float32, the quick way, without a gradient."""
    with fast(teacher) as run:
        return torch.cat(list(halving(run, images, Chunk(len(images)))))


LARGEST_STEP = 0.7  # of the weights' size, over all layers together

LEAST_STEPS = 3  # a round: with fewer samples smaller batches, or the decay comes before the repair is done

StepLoss = Callable[[Runner, Tensor, Tensor], Tensor]
BeforeRound = Callable[[nn.Module, int], None]
AfterStep = Callable[[nn.Module], None]
Follower = Callable[[nn.Module, int], None]

_follower: ContextVar[Follower | None] = ContextVar("follower", default=None)


@contextmanager
def following(follower: Follower) -> Iterator[None]:
    """Inside the block a defense that trains in rounds calls ``follower(model, round)`` before the first, 0, and after
    each.

    The model is the one in training: to be looked at, not changed. A defense that trains twice starts again at 0.
    """
    token = _follower.set(follower)
    try:
        yield
    finally:
        _follower.reset(token)


def follower() -> Follower:
    """What is to be called with the model and its round, see `following`."""
    return _follower.get() or (lambda model, index: None)


def train_repair(
    model: nn.Module,
    samples: Samples,
    schedule: Schedule,
    loss: StepLoss,
    *,
    seed: int,
    before_round: BeforeRound | None = None,
    after_step: AfterStep | None = None,
    moving: Sequence[torch.Generator] | None = None,
) -> tuple[nn.Module, list[float]]:
    """The shared loop. ``loss(run, images, labels)`` is minimised on shuffled batches, in eval mode throughout.

    Samples stay on the CPU; a step's go to where the model is. Eval mode keeps BatchNorm statistics, which a few
    hundred samples would spoil. ``before_round(model, round)`` is called before each pass, ``after_step(model)`` after
    each step. moving: the random generators of ``loss``, where it changes nothing else; with them the loop goes on from
    the repair's checkpoint, without (None) it begins again. Returns the repaired copy and the mean loss of each round.
    """
    repaired, device = copy.deepcopy(model).eval(), device_of(model)
    lr = bearable(repaired, schedule.lr)
    optimizer = torch.optim.AdamW(repaired.parameters(), lr, weight_decay=schedule.weight_decay)
    steps = min(max(LEAST_STEPS, len(samples) // schedule.batch_size), len(samples))
    rate = _warm_cosine(schedule.rounds * steps)
    rng, follow = stream(seed, "repair"), follower()
    curve: list[float] = []

    def state() -> Tensors:
        found = named("model", repaired.state_dict()) | named("optimizer", optimizer_state(optimizer))
        found |= named("moving", states([rng, *(moving or ())]))
        return found | {"loss": torch.tensor(curve, dtype=torch.float64), "pieces": torch.tensor(pieces)}

    pieces = 1

    def backward(run: Runner, batch: Tensor) -> float:
        """The gradients of one step, in as many pieces as the memory asks for. Returns the loss."""
        nonlocal pieces
        before = states(moving or ())
        while True:
            optimizer.zero_grad()
            total = 0.0
            try:
                for piece in batch.tensor_split(min(pieces, max(1, len(batch) // 2))):  # two samples at least
                    value = loss(run, samples.images[piece].to(device), samples.labels[piece].to(device))
                    value = value * (len(piece) / len(batch))
                    value.backward()
                    total += value.item()
            except (RuntimeError, MemoryError) as error:
                if len(batch) // (2 * pieces) < 2:
                    raise
                halved(error, len(batch) // pieces)
                pieces *= 2
                restore(moving or (), before)  # what the attempt drew
            else:
                return total

    unfinished = nothing_kept() if moving is None else current()
    if "loss" in unfinished.tensors:
        left = unfinished.tensors
        repaired.load_state_dict(part("model", left))
        restore_optimizer(optimizer, part("optimizer", left))
        restore([rng, *(moving or ())], part("moving", left))
        curve += left["loss"].tolist()
        pieces = int(left["pieces"])
    follow(repaired, len(curve))
    with unfinished.working() as after_round:
        for index in range(len(curve), schedule.rounds):
            if before_round is not None:
                before_round(repaired, index)
            total = 0.0
            with fast(repaired) as run:
                for step, batch in enumerate(_batches(len(samples), steps, rng), index * steps):
                    for group in optimizer.param_groups:
                        group["lr"] = lr * rate(step)
                    total += backward(run, batch)
                    optimizer.step()
                    if after_step is not None:
                        after_step(repaired)
            curve.append(total / steps)
            follow(repaired, index + 1)
            after_round(state)
    unfinished.save(state())
    return repaired, curve


def bearable(model: nn.Module, lr: float) -> float:
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
