"""Which images of a class does the model hold on to? Noise is turned up, and the images sort themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.errors import InputError
from smi.plotting.pictures import BLUE, VERMILLION, image_row
from smi.runtime.compute import predict
from smi.tutorial.explorers.base import Explorer
from smi_kernels import stability_scores


@dataclass(frozen=True, eq=False)
class Ranking:
    """Images of one class, most stable first.

    Attributes:
        label: The class.
        images: ``[N, C, H, W]``.
        scores: Their stability ``[N]``.
        held: Whether the model takes an image for its class at all ``[N]``.
    """

    label: int
    images: Tensor
    scores: Tensor
    held: Tensor


class StabilityExplorer(Explorer):
    """The images of one class, ordered from most to least stable under noise that the reader chooses.

    Args:
        model: Images in [0, 1] to logits.
        samples: Labelled images, such as `smi.invert` makes.
        limit: Images shown; where a class has more, they are spread evenly over them.
        names: Of the classes; default their numbers.
    """

    def __init__(self, model: nn.Module, samples: Samples, *, limit: int = 12, names: tuple[str, ...] = ()) -> None:
        if not isinstance(samples, Samples):
            raise InputError(f"samples is a {type(samples).__name__}. Allowed: Samples, as smi.invert makes them.")
        self.model, self.samples, self.limit = model.eval(), samples, limit
        present = samples.labels.unique().tolist()
        slider = {"min": 0, "max": 0.3, "step": 0.01, "readout_format": ".2f"}
        super().__init__(
            {
                "label": W.SelectionSlider(
                    options=[(names[c] if names else str(c), c) for c in present], description="Class"
                ),
                "sigma_x": W.FloatSlider(0.03, description="Noise on pixels σ_x", **slider),
                "sigma_w": W.FloatSlider(0.05, description="on weights σ_w", **slider),
                "k": W.SelectionSlider(options=[1, 2, 4, 8, 16], value=16, description="Draws K"),
            }
        )

    def compute(self, *, label: int, sigma_x: float, sigma_w: float, k: int) -> Ranking:
        """Score the images of class ``label`` with ``k`` draws and sort them."""
        of_class = (self.samples.labels == label).nonzero()[:, 0]
        count = min(self.limit, len(of_class))
        chosen = of_class[torch.linspace(0, len(of_class) - 1, count).round().long()]
        images = self.samples.images[chosen]
        # float32 on every machine, so that near-ties fall the same way on all of them.
        scores = stability_scores(self.model, images, k=k, sigma_x=sigma_x, sigma_w=sigma_w, dtype="float32")
        held = predict(self.model, images).argmax(1) == label
        order = scores.argsort(stable=True)
        return Ranking(label, images[order], scores[order], held[order])

    def figure(self, result: Ranking) -> Figure:
        """The images in a row, and below each a bar of its score; a cross marks those taken for another class."""
        figure = Figure(figsize=(9, 3), layout="constrained")
        row, bars = figure.subplots(2, 1, height_ratios=(1, 1.6))
        count = len(result.images)
        colors = [BLUE if held else VERMILLION for held in result.held.tolist()]
        image_row(row, result.images, [f"{score:.2g}" for score in result.scores.tolist()], colors)
        row.set_title("most stable  →  least stable", fontsize=10)
        heights = result.scores.tolist()
        bars.bar(range(count), heights, color=colors)
        away = [i for i, held in enumerate(result.held.tolist()) if not held]
        bars.plot(away, [heights[i] for i in away], "x", color="black", markersize=9, label="taken for another class")
        bars.set(xlim=(-0.5, count - 0.5), xticks=[], ylabel="score S")
        bars.spines[["top", "right"]].set_visible(False)
        if away:
            bars.legend(frameon=False, loc="upper left")
        return figure

    def describe(self, result: Ranking) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        low, high = result.scores[0].item(), result.scores[-1].item()
        wrong = int((~result.held).sum())
        alt = (
            f"{len(result.images)} images of class {result.label} from most to least stable, with a bar for each score."
        )
        caption = f"Class {result.label}: scores from {low:.2g} to {high:.2g}; {wrong} taken for another class."
        return alt, caption, {"most_stable": low, "least_stable": high, "taken_for_another": wrong}
