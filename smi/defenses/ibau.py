"""I-BAU (Zeng et al., "Adversarial Unlearning of Backdoors via Implicit Hypergradient", ICLR 2022).

    min_θ  E CE(f_θ(x + δ*(θ)), y),   δ*(θ) = argmax_{‖δ‖≤C} E CE(f_θ(x + δ), y)

Unlearn whatever one universal δ on all images can do. Few rounds: search δ, then step along the gradient of the outer
loss that also follows δ*(θ), the implicit hypergradient (`smi/defenses/hypergradient.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from smi.defenses.base import Defense, Repair, defenses
from smi.defenses.hypergradient import BilevelProblem, hypergradient
from smi.defenses.universal import into_ball
from smi.domains.base import PublicImages, Samples
from smi.runtime.checks import check_number, device_of
from smi.runtime.compute import unfrozen
from smi.runtime.job import Job, Loop

SHRINK = 1e-3  # weight of ‖δ‖² in the inner problem


@defenses.register("ibau")
@dataclass(frozen=True, kw_only=True)
class IBAU(Defense):
    """I-BAU with the settings of the authors' code, which assume 5,000 samples.

    With a few hundred it is here to be compared with, not relied on. It runs in float32 and in eval mode throughout and
    does not use public images. Two details differ from the authors' code: δ takes ``inner_steps`` steps and stays in
    the ball, where theirs takes one a batch and is projected at the end or not at all; and each step of the outer level
    has the inner problem of its own batch, where theirs keeps to that of the first.

    Attributes:
        rounds: Searches for δ, each followed by a pass over the samples.
        inner_steps: Steps of gradient ascent on δ, from zero.
        inner_lr: Their rate.
        lr: Of Adam on the weights.
        batch_size: Samples a step.
        radius: C, the largest L2 norm of δ, in [0, 1] pixels.
        stamped: Share of a batch in [0, 1] that carries δ, at least one image: below a hundred images the published
            share rounds to none, and I-BAU to fine-tuning.
        eta: Rate of the fixed-point map of the hypergradient.
        iterations: Terms that are taken of it.

    >>> import smi
    >>> suspect, prior = smi.load_classifier("digits-badnets"), smi.load_prior("digits")
    >>> samples = smi.invert(suspect, prior, smi.Latent(steps=1), per_class=2)
    >>> IBAU(rounds=1).repair(suspect, samples)
    Repair(by ibau on latent samples)
    """

    rounds: int = 5
    inner_steps: int = 5
    inner_lr: float = 10.0
    lr: float = 1e-3
    batch_size: int = 100
    radius: float = 10.0
    stamped: float = 0.01
    eta: float = 0.1
    iterations: int = 5

    name = "ibau"

    def __post_init__(self) -> None:
        for whole in ("rounds", "inner_steps", "batch_size", "iterations"):
            check_number(whole, getattr(self, whole), low=1, integer=True)
        for rate in ("inner_lr", "lr", "radius", "eta"):
            check_number(rate, getattr(self, rate), low=0)
        check_number("stamped", self.stamped, low=0, high=1)

    def _repair(self, model: nn.Module, samples: Samples, public: PublicImages | None, job: Job) -> Repair:
        repaired = unfrozen(model)
        names = [name for name, _ in repaired.named_parameters()]
        theta = list(repaired.parameters())
        optimizer = torch.optim.Adam(theta, self.lr)
        rng, curve, device = job.rng("published"), list[float](), device_of(model)
        first = torch.zeros(1, *samples.images.shape[1:], device=device)

        def logits(images: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return functional_call(repaired, dict(zip(names, weights, strict=True)), (images,))

        def one_round(index: int) -> None:
            delta = self._ascend(repaired, samples, rng)
            if index == 0:
                first.copy_(delta)
            for batch in torch.randperm(len(samples), generator=rng).split(self.batch_size):
                problem = self._problem(logits, samples.images[batch].to(device), samples.labels[batch].to(device))
                gradients = hypergradient(problem, delta, theta, iterations=self.iterations)
                for weight, gradient in zip(theta, gradients, strict=True):
                    weight.grad = gradient
                optimizer.step()
            with torch.no_grad():
                curve.append(problem.outer(delta, theta).item())

        loop = Loop(
            name="training", rounds=self.rounds, trained=repaired.state_dict() | {"first": first}, optimizer=optimizer,
            generators=[rng], curves={"loss": curve},
        )  # fmt: skip
        loop.run(job, one_round)
        log = {"loss": curve, "radius": self.radius}
        return Repair(repaired, self.name, samples.source, self.settings(), log, first.cpu())

    def _ascend(self, model: nn.Module, samples: Samples, rng: torch.Generator) -> Tensor:
        """Plain ascent from zero against the model's own labels, one batch a step: ``[1, C, H, W]``."""
        device = device_of(model)
        delta = torch.zeros(1, *samples.images.shape[1:], device=device)
        for _ in range(self.inner_steps):
            images = samples.images[torch.randperm(len(samples), generator=rng)[: self.batch_size]].to(device)
            with torch.no_grad():
                own = model(images).argmax(1)
            delta.requires_grad_()
            loss = -F.cross_entropy(model(images + delta), own) + SHRINK * delta.square().sum()
            (gradient,) = torch.autograd.grad(loss, delta)
            delta = into_ball(delta.detach() - self.inner_lr * gradient, self.radius)
        return delta

    def _problem(self, logits: Any, images: Tensor, labels: Tensor) -> BilevelProblem:
        count = max(1, round(self.stamped * len(images)))

        def inner(delta: Tensor, weights: Sequence[Tensor]) -> Tensor:
            return -F.cross_entropy(logits(images + delta, weights), labels) + SHRINK * delta.square().sum()

        def outer(delta: Tensor, weights: Sequence[Tensor]) -> Tensor:
            mixed = torch.cat([images[:count] + delta, images[count:]])
            return F.cross_entropy(logits(mixed, weights), labels)

        return BilevelProblem(inner, outer, self.radius, self.eta)
