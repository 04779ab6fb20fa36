"""What do the stability terms change? The same latents, searched without and with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.inversion import Latent, Stabilized
from smi.inversion.base import Task
from smi.plotting.pictures import BLUE, VERMILLION, image_row
from smi.priors.base import Prior, check_prior
from smi.runtime.compute import fast, frozen, predict
from smi.runtime.seeding import stream
from smi.tutorial.explorers.base import Explorer
from smi_kernels import stability_scores

COUNT = 6


@dataclass(frozen=True, eq=False)
class Searched:
    """Images of one class, and how stable they are.

    Attributes:
        images: ``[6, C, H, W]``.
        scores: Their stability scores ``[6]``.
        held: Whether each is still taken for the class.
    """

    images: Tensor
    scores: Tensor
    held: list[bool]


@dataclass(frozen=True, eq=False)
class Pair:
    """What was found from the same latents without the stability terms, and with them."""

    label: int
    without: Searched
    with_terms: Searched


class StabiliseExplorer(Explorer):
    """Stabilised inversion with weights and radii of the reader's choice, beside latent inversion.

    Args:
        model: Images in [0, 1] to logits.
        prior: The generator.
        classes: How many the reader chooses from.
        steps: Of each search.
        seed: Of the latents.
    """

    def __init__(self, model: nn.Module, prior: Prior, *, classes: int = 10, steps: int = 30, seed: int = 0) -> None:
        check_prior(prior)
        self.model, self.prior, self.steps, self.seed = frozen(model), prior, steps, seed

        def choose(name: str, values: tuple[float, ...], value: float) -> W.Widget:
            return W.SelectionSlider(options=[(f"{v:g}", v) for v in values], value=value, description=name)

        super().__init__(
            {
                "label": W.IntSlider(classes - 1, min=0, max=classes - 1, description="Class"),
                "lambda_x": choose("Weight λ_x", (0.0, 0.1, 0.3, 1.0, 3.0, 10.0), 0.3),
                "epsilon": choose("Radius ε, L2 norm", (0.5, 1.0, 2.0, 4.0, 8.0), 1.0),
                "lambda_w": choose("Weight λ_w", (0.0, 0.1, 0.3, 1.0, 3.0, 10.0), 0.3),
                "rho": choose("Radius ρ, relative", (0.01, 0.02, 0.05, 0.1, 0.2), 0.02),
            },
            button="Search (a few seconds)",
        )

    def compute(self, *, label: int, lambda_x: float, epsilon: float, lambda_w: float, rho: float) -> Pair:
        """Search six latents twice, from the same start."""
        method = Stabilized(lambda_x=lambda_x, epsilon=epsilon, lambda_w=lambda_w, rho=rho, steps=self.steps)
        return Pair(label, self._search(Latent(steps=self.steps), label), self._search(method, label))

    def _search(self, method: Latent, label: int) -> Searched:
        labels = torch.full((COUNT,), label)
        with fast(self.model) as run:
            images = method.optimise(Task(self.model, run, self.prior, labels, stream(self.seed, "stabilise")))
        # float32 on every machine, so that near-ties fall the same way on all of them.
        scores = stability_scores(self.model, images, k=16, sigma_x=0.03, sigma_w=0.05, dtype="float32")
        return Searched(images, scores, (predict(self.model, images).argmax(1) == label).tolist())

    def figure(self, result: Pair) -> Figure:
        """Both searches in a row each, with scores; those that are taken for another class in the other colour."""
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        titles = ("without stability terms", "with them, from the same latents")
        for axes, found, title in zip(figure.subplots(2, 1), (result.without, result.with_terms), titles, strict=True):
            colors = [BLUE if held else VERMILLION for held in found.held]
            names = [
                f"S = {score:.1g}" + ("" if held else ", other class")
                for score, held in zip(found.scores.tolist(), found.held, strict=True)
            ]
            image_row(axes, found.images, names, colors)
            axes.set_title(title, fontsize=10)
        return figure

    def describe(self, result: Pair) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        before, after = (found.scores.median().item() for found in (result.without, result.with_terms))
        lost = COUNT - sum(result.with_terms.held)
        alt = f"{COUNT} images of class {result.label} found without stability terms, and below with them."
        caption = f"Median score {before:.2g} without the terms, {after:.2g} with them; {lost} taken for another class."
        return alt, caption, {"without": before, "with": after, "lost": lost}
