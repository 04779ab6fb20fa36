"""Latent inversion: search the prior's latent space for images that the model takes for class y.

With the stability terms off this is generative model inversion (Zhang et al., "The Secret Revealer", CVPR 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from smi.inversion.base import Inversion, Task, inversions
from smi.priors.base import sample_latents
from smi.runtime.checks import check_number

CLEAR = 0.1  # a cross-entropy below this counts as clear


@inversions.register("latent")
@dataclass(frozen=True, kw_only=True)
class Latent(Inversion):
    """Minimise ``CE(f(G(z)), y) − lambda_prior · D(G(z))`` with z kept in the ball ``‖z‖ ≤ norm_ball · √d``.

    Attributes:
        lambda_prior: Weight of the critic.
        norm_ball: 1 is the radius at which standard normal latents lie.
        pool: Random latents drawn per candidate. The search starts from those that the model already takes for y most
            clearly, so that it need not leave the region where the generator is good (Struppek et al., "Plug & Play
            Attacks", ICML 2022).
    """

    steps: int = 30
    lr: float = 0.05
    lambda_prior: float = 0.1
    norm_ball: float = 1.0
    pool: int = 8

    name = "latent"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("lambda_prior", self.lambda_prior, low=0)
        check_number("norm_ball", self.norm_ball, low=0.01)
        check_number("pool", self.pool, low=1, integer=True)

    def start(self, task: Task) -> Tensor:
        """Of ``pool`` times as many normal latents those that the model takes for y most clearly ``[N, d]``."""
        wanted = len(task.labels)
        z = sample_latents(task.prior, wanted * self.pool, task.rng).to(task.labels.device)
        self.project(z)
        with torch.no_grad():
            chunks = z.split(256)
            loss = torch.cat(
                [
                    F.cross_entropy(task.run(task.generate(c)), task.labels[:1].expand(len(c)), reduction="none")
                    for c in chunks
                ]
            )
        # Equally clear ones are taken in the order drawn: the very clearest alone would all look alike.
        return z[loss.clamp(min=CLEAR).argsort(stable=True)[:wanted]]

    def render(self, variable: Tensor, task: Task) -> Tensor:
        """``G(z)``."""
        return task.generate(variable)

    def objective(self, images: Tensor, variable: Tensor, task: Task) -> Tensor:
        """Identity and prior terms, averaged over the batch."""
        return F.cross_entropy(task.run(images), task.labels) + self.prior_term(images, task)

    def prior_term(self, images: Tensor, task: Task) -> Tensor:
        """How unreal the critic finds the batch, weighted; 0 without a critic."""
        realism = task.realism(images) if self.lambda_prior else None
        return images.new_zeros(()) if realism is None else -self.lambda_prior * realism.mean()

    def project(self, variable: Tensor) -> None:
        """Shrink latents that left the ball."""
        radius = self.norm_ball * math.sqrt(variable.shape[1])
        variable.mul_((radius / variable.norm(dim=1, keepdim=True)).clamp(max=1))
