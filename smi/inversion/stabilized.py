"""Stabilised inversion, the paper's method: the latent search with predictions made stable on two sides.

    min_z  CE(f(x), y) + λ_prior · prior + λ_x · max_{‖δ‖≤ε} CE(f(x + δ), y) + λ_w · max_{‖v‖≤ρ} CE(f_{θ+v}(x), y)

with x = G(z). Setting a weight to zero gives the ablations: both zero is latent inversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.errors import InputError
from smi.inversion.base import Task, inversions
from smi.inversion.latent import Latent
from smi.inversion.perturbation import slopes_at, worst_input, worst_parameters
from smi.runtime.checks import check_number
from smi.runtime.precision import asked_precision
from smi_kernels import stability_scores

MODES = ("adversarial", "random")


@inversions.register("smi")
@dataclass(frozen=True, kw_only=True)
class Stabilized(Latent):
    """Latent inversion with input and parameter stability.

    Attributes:
        lambda_x: Weight of the input term.
        lambda_w: Weight of the parameter term.
        epsilon: L2 radius of δ per image, in [0, 1] pixels.
        rho: Radius of v relative to each tensor's norm.
        inner: "adversarial" (ascent, of one step for v) or "random" (mean over draws of the same expected size, by
            `smi_kernels`).
        ascent_steps: Of the ascent for δ.
        k: Draws of "random".
        warmup: Share of the steps, at the start, that go without the two terms. The search first finds the class, then
            stabilises.
    """

    lambda_x: float = 0.3
    lambda_w: float = 0.3
    epsilon: float = 1.0
    rho: float = 0.02
    inner: str = "adversarial"
    ascent_steps: int = 1
    k: int = 4
    warmup: float = 0.5

    name = "smi"

    def __post_init__(self) -> None:
        super().__post_init__()
        for weight in ("lambda_x", "lambda_w", "epsilon", "rho"):
            check_number(weight, getattr(self, weight), low=0)
        check_number("ascent_steps", self.ascent_steps, low=1, integer=True)
        check_number("k", self.k, low=1, integer=True)
        check_number("warmup", self.warmup, low=0, high=1)
        if self.inner not in MODES:
            raise InputError(f"inner is {self.inner!r}. Allowed: {', '.join(MODES)}.")

    @property
    def settled(self) -> int:
        """A third of the warm-up: the search has found the class, and what is not chosen need not be refined."""
        return math.ceil(self.warmup * self.steps / 3)

    def objective(self, images: Tensor, variable: Tensor, task: Task) -> Tensor:
        """Identity, prior and, after the warm-up, stability."""
        if task.progress < self.warmup:
            return super().objective(images, variable, task)
        if self.inner == "random":
            return super().objective(images, variable, task) + self._random(images, task)
        return self._adversarial(images, task) + self.prior_term(images, task)

    def _adversarial(self, images: Tensor, task: Task) -> Tensor:
        """Identity and both stability terms."""
        value, slope, slopes = slopes_at(task.run, task.model, images, task.labels)
        total = value + ((images - images.detach()) * slope).sum()  # the identity term: its value and its gradient
        if self.lambda_x:
            delta = worst_input(
                task.run, images, task.labels, radius=self.epsilon, steps=self.ascent_steps, slope=slope
            )
            total = total + self.lambda_x * F.cross_entropy(task.run(images + delta), task.labels)
        if self.lambda_w:
            weights = worst_parameters(task.run, task.model, images, task.labels, radius=self.rho, slopes=slopes)
            total = total + self.lambda_w * F.cross_entropy(task.run(images, weights), task.labels)
        return total

    def _random(self, images: Tensor, task: Task) -> Tensor:
        total = images.new_zeros(())
        sigma_x = self.epsilon / math.sqrt(images[0].numel())
        for weight, noise in ((self.lambda_x, (sigma_x, 0.0)), (self.lambda_w, (0.0, self.rho))):
            if weight:
                draw = int(torch.randint(2**62, (), generator=task.rng))
                scores = stability_scores(
                    task.model, images, task.labels, k=self.k, sigma_x=noise[0], sigma_w=noise[1],
                    divergence="cross_entropy", seed=draw, dtype=asked_precision(),
                )  # fmt: skip
                total = total + weight * scores.mean()
        return total
