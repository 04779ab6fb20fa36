"""What lies between two latents, and what happens away from where latents are typical?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.plotting.pictures import BLUE, image_row
from smi.priors.base import Prior, check_prior, sample_latents
from smi.runtime.checks import check_number
from smi.runtime.compute import frozen, predict
from smi.runtime.seeding import stream
from smi.tutorial.explorers.base import Explorer

FRAMES, CROWD = 9, 64  # images of the walk, and those that the spread is measured on


@dataclass(frozen=True, eq=False)
class Walk:
    """Images along a walk, and what the model says of each.

    Attributes:
        images: ``[9, C, H, W]``.
        answers: The model's.
        sure: How sure it is of each, in [0, 1].
        spread: Mean standard deviation over images of a pixel, of random latents with the same truncation.
    """

    images: Tensor
    answers: list[int]
    sure: list[float]
    spread: float


class LatentExplorer(Explorer):
    """A walk through a prior's latent space, from one random latent to another.

    Args:
        prior: The generator.
        model: Images in [0, 1] to logits, which says what it sees.
        count: How many latents there are to choose from.
        seed: Of the latents.
    """

    def __init__(self, prior: Prior, model: nn.Module, *, count: int = 20, seed: int = 0) -> None:
        check_prior(prior)
        check_number("count", count, low=2, integer=True)
        self.prior, self.model = prior, frozen(model)
        self.latents = sample_latents(prior, count, stream(seed, "walk"))
        self.crowd = sample_latents(prior, CROWD, stream(seed, "crowd"))
        super().__init__(
            {
                "start": W.IntSlider(0, min=0, max=count - 1, description="From latent"),
                "end": W.IntSlider(1, min=0, max=count - 1, description="To latent"),
                "truncation": W.FloatSlider(1.0, min=0, max=3, step=0.25, description="Truncation τ"),
            }
        )

    @torch.no_grad()
    def compute(self, *, start: int, end: int, truncation: float) -> Walk:
        """Walk on the great circle through both latents, so that every step is as long as a typical latent."""
        z = torch.stack([slerp(self.latents[start], self.latents[end], t / (FRAMES - 1)) for t in range(FRAMES)])
        images = self.prior.generate(truncation * z).float().clamp(0, 1)
        crowd = self.prior.generate(truncation * self.crowd).float().clamp(0, 1)
        certainty, answers = predict(self.model, images).softmax(1).max(1)
        return Walk(images, answers.tolist(), certainty.tolist(), crowd.std(0).mean().item())

    def figure(self, result: Walk) -> Figure:
        """The images in a row, with the answers below."""
        figure = Figure(figsize=(9, 1.7), layout="constrained")
        labels = [f'"{a}" {100 * s:.0f} %' for a, s in zip(result.answers, result.sure, strict=True)]
        axes = figure.subplots()
        image_row(axes, result.images, labels, [BLUE] * len(labels))
        axes.set_title("the model's answer to each, and its probability", fontsize=10)
        return figure

    def describe(self, result: Walk) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        turns = sum(a != b for a, b in zip(result.answers, result.answers[1:], strict=False))
        alt = f"{FRAMES} generated images along a walk between two latents, with the model's answer below each."
        caption = f"The answer changes {turns} times along the way; spread of random images {result.spread:.2g}."
        return alt, caption, {"turns": turns, "spread": result.spread}


def slerp(start: Tensor, end: Tensor, t: float) -> Tensor:
    """Spherical interpolation ``[d]`` (Shoemake, 1985); straight where the two point the same way."""
    cosine = (start @ end / (start.norm() * end.norm())).clamp(-1, 1)
    angle = cosine.acos()
    if angle.sin() < 1e-4:
        return (1 - t) * start + t * end
    return (((1 - t) * angle).sin() * start + (t * angle).sin() * end) / angle.sin()
