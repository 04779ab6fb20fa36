"""I-BAU's min-max problem with a solver that is reliable with a few hundred samples.

    min_θ  E max_{‖δ‖≤C} CE(f_θ(x + δ), y) + distill · KL(f_suspect ‖ f_θ)

What differs from the published solver, and why: the inner maximum is searched afresh each round, from noise, towards
every class and away from all (a single untargeted δ misses the trigger on half of the seeds); all the δ's are stamped,
each as often as it still fools (the worst one alone makes the model oscillate), spread out or concentrated on a few
pixels (a patch comes out of an L2 search with noise around it); C comes from the data
(`natural_radius`); clean behaviour is held by distillation on unstamped samples and public images, so that accuracy
costs little; and the outer gradient is first-order: δ is found afresh, so that nothing implicit is left to follow. What
no δ resembles, all-to-all labels or a warp, gives way when the outer level starts from a model that has forgotten most
of its weights and relearned by that distillation; that costs accuracy, and is off by default (`forget`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smi.checks import check_number
from smi.compute import Runner, fast, frozen
from smi.defenses.base import Distillation, Schedule, train_repair
from smi.defenses.restart import forget
from smi.defenses.universal import AWAY, concentrate, fooling_rate, natural_radius, universal
from smi.domains.base import PublicImages, Samples
from smi.seeding import stream

SPARSEST = 0.02  # of the pixels, in what is stamped


@dataclass(frozen=True, kw_only=True)
class Robust:
    """The robust solver.

    goal: share that fixes the radius, see `natural_radius`. radius: C in [0, 1] pixels; None for that rule. stamped:
    share of each batch that carries a δ. steps: ascent steps for a δ. images: samples that a δ is searched on. targets:
    δ's searched a round; with more classes than that, those that fooled most when last tried. forget: how much of
    the weights is chance before they are relearned, in [0, 1), see `forget`; 0 starts from the suspect model; 0.8
    forgets most of a patch on digits, and little of a warp. relearn: rounds of that.
    """

    schedule: Schedule = field(default_factory=lambda: Schedule(rounds=30, lr=3e-3, distill=40.0))
    goal: float = 0.5
    radius: float | None = None
    stamped: float = 0.5
    steps: int = 5
    images: int = 40
    targets: int = 6
    forget: float = 0.0
    relearn: int = 100

    name = "robust"

    def __post_init__(self) -> None:
        check_number("goal", self.goal, low=0.01, high=1)
        check_number("stamped", self.stamped, low=0.01, high=0.99)
        check_number("steps", self.steps, low=1, integer=True)
        check_number("images", self.images, low=1, integer=True)
        check_number("targets", self.targets, low=1, integer=True)
        check_number("forget", self.forget, low=0, high=0.999)
        check_number("relearn", self.relearn, low=1, integer=True)
        if self.radius is not None:
            check_number("radius", self.radius, low=0)

    def solve(
        self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int
    ) -> tuple[nn.Module, dict[str, Any], Tensor]:
        """Repaired model, log, and the universal δ per class on the suspect model ``[classes, C, H, W]``."""
        adversary = _Adversary(self, model, samples, stream(seed, "inner"))
        first = adversary.search(model, torch.arange(samples.num_classes))
        distil = Distillation(model, public, stream(seed, "distil"))

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            count = max(1, round(self.stamped * len(images)))
            value = F.cross_entropy(run(adversary.stamp(images[:count])), labels[:count])
            if self.schedule.distill:
                return value + self.schedule.distill * distil(run, images[count:])
            return value + F.cross_entropy(run(images[count:]), labels[count:])

        start = self._start(model, samples, public, seed) if self.forget else model
        repaired, curve = train_repair(
            start, samples, self.schedule, loss, seed=seed, before_round=adversary.before_round
        )
        after = adversary.search(repaired, torch.arange(samples.num_classes))
        log = {
            "loss": curve,
            "fooling": adversary.curve,
            "radius": adversary.radius,
            "fooling_before": first.rates.tolist(),
            "fooling_after": after.rates.tolist(),
        }
        return repaired, log, first.delta

    def _start(self, model: nn.Module, samples: Samples, public: PublicImages | None, seed: int) -> nn.Module:
        """A model that behaves much like the suspect on the samples and public images, with other weights."""
        images, rng = samples.images, stream(seed, "forget")
        distil = Distillation(model, public, stream(seed, "relearn"))
        if public is not None:
            images = torch.cat([images, public.images[torch.randperm(len(public), generator=rng)[: len(images)]]])

        def loss(run: Runner, images: Tensor, labels: Tensor) -> Tensor:
            return distil(run, images) if self.schedule.distill else F.cross_entropy(run(images), labels)

        schedule = replace(self.schedule, rounds=self.relearn)
        return train_repair(forget(model, self.forget, images, rng), samples, schedule, loss, seed=seed)[0]


@dataclass
class _Found:
    delta: Tensor
    rates: Tensor


class _Adversary:
    """The inner level: universal δ's against the current model, and how much each still fools."""

    def __init__(self, config: Robust, model: nn.Module, samples: Samples, rng: torch.Generator) -> None:
        self.config, self.samples, self.rng = config, samples, rng
        self.classes = torch.tensor([AWAY, *range(samples.num_classes)])
        self.rates = torch.ones(len(self.classes))
        self.delta = torch.zeros(len(self.classes), *samples.images.shape[1:])
        self.curve: list[float] = []
        images, labels = self._draw(2 * config.images)
        if config.radius is None:
            with fast(frozen(model)) as run:
                self.radius = natural_radius(
                    run, images, labels, samples.num_classes, goal=config.goal, steps=config.steps, rng=rng
                )
        else:
            self.radius = config.radius

    def search(self, model: nn.Module, targets: Tensor) -> _Found:
        """Fresh δ's for ``targets``, with their fooling rates on samples they were not searched on."""
        images, labels = self._draw(2 * self.config.images)
        half = len(images) // 2 or 1
        with fast(frozen(model)) as run:
            delta = universal(
                run, images[:half], labels[:half], targets, radius=self.radius, steps=self.config.steps, rng=self.rng
            )
            return _Found(delta, fooling_rate(run, images[half:], labels[half:], targets, delta))

    def before_round(self, model: nn.Module, index: int) -> None:
        """Renew the δ's of the targets that fooled most when last tried (ties at random)."""
        tie = torch.rand(len(self.rates), generator=self.rng) * 1e-3
        chosen = (self.rates + tie).argsort(descending=True)[: self.config.targets]
        found = self.search(model, self.classes[chosen])
        self.delta[chosen], self.rates[chosen] = found.delta, found.rates
        self.curve.append(found.rates.max().item())

    def stamp(self, images: Tensor) -> Tensor:
        """Each image with one δ, drawn in proportion to how much it fools, from spread out to a few pixels."""
        which = torch.multinomial(self.rates + 1e-3, len(images), replacement=True, generator=self.rng)
        share = SPARSEST ** torch.rand(len(images), generator=self.rng)
        return (images + concentrate(self.delta[which], share)).clamp(0, 1)

    def _draw(self, count: int) -> tuple[Tensor, Tensor]:
        index = torch.randperm(len(self.samples), generator=self.rng)[:count]
        return self.samples.images[index], self.samples.labels[index]
