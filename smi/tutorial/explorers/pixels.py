"""What a model takes for a class, pixel by pixel: more smoothness, more steps, and never a digit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.inversion import Pixel
from smi.inversion.base import Task
from smi.plotting.pictures import BLUE, VERMILLION, image_row
from smi.priors.base import Prior
from smi.runtime.compute import fast, frozen, predict
from smi.runtime.seeding import stream
from smi.tutorial.explorers.base import Explorer

COUNT = 6


@dataclass(frozen=True, eq=False)
class Inverted:
    """Images of one class, and what is said of them.

    Attributes:
        label: The class.
        images: ``[6, C, H, W]``.
        sure: The model's mean probability of it, in [0, 1].
        judge: The other's answers.
    """

    label: int
    images: Tensor
    sure: float
    judge: list[int]


class PixelExplorer(Explorer):
    """Pixel inversion with a smoothness weight and a number of steps of the reader's choice.

    Args:
        model: Images in [0, 1] to logits.
        judge: An independent classifier of the same classes, which says what the images show.
        prior: Gives the image shape.
        classes: How many there are.
        seed: Of the noise that is begun with.
    """

    def __init__(self, model: nn.Module, judge: nn.Module, prior: Prior, *, classes: int = 10, seed: int = 0) -> None:
        self.model, self.judge, self.prior, self.seed = frozen(model), judge.eval(), prior, seed
        weights = [(f"{weight:g}", weight) for weight in (0.0, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)]
        super().__init__(
            {
                "label": W.IntSlider(0, min=0, max=classes - 1, description="Class"),
                "smooth": W.SelectionSlider(options=weights, value=3.0, description="TV weight λ"),
                "steps": W.IntSlider(30, min=0, max=40, step=5, description="Steps"),
            }
        )

    def compute(self, *, label: int, smooth: float, steps: int) -> Inverted:
        """Invert six images of the class from the same noise."""
        labels = torch.full((COUNT,), label)
        with fast(self.model) as run:
            task = Task(self.model, run, self.prior, labels, stream(self.seed, "pixels"))
            images = Pixel(lambda_tv=smooth, steps=steps).optimise(task)
        sure = predict(self.model, images).softmax(1)[:, label].mean().item()
        return Inverted(label, images, sure, predict(self.judge, images).argmax(1).tolist())

    def figure(self, result: Inverted) -> Figure:
        """The images, and what the judge says below."""
        figure = Figure(figsize=(8, 1.9), layout="constrained")
        axes = figure.subplots()
        colors = [BLUE if answer == result.label else VERMILLION for answer in result.judge]
        image_row(axes, result.images, [f'judge: "{answer}"' for answer in result.judge], colors)
        axes.set_title(f"the model: class {result.label}, with {100 * result.sure:.0f} % on average", fontsize=10)
        return figure

    def describe(self, result: Inverted) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        agree = result.judge.count(result.label)
        alt = f"{COUNT} images inverted for class {result.label}, with the independent judge's answer below each."
        caption = (
            f"The model gives class {result.label} a probability of {100 * result.sure:.0f} % on average; the judge "
            f"agrees on {agree} of {COUNT}."
        )
        return alt, caption, {"sure": result.sure, "agree": agree}
