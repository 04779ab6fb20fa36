"""How far must all images move, together, before a model calls them what one wants?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from smi.defenses.universal import fooling_rate, universal
from smi.domains.base import Samples
from smi.errors import InputError
from smi.plotting.pictures import answered_row
from smi.runtime.compute import fast, frozen, predict
from smi.runtime.seeding import stream
from smi.tutorial.explorers.base import Explorer

SHOWN, SEARCHED = 8, 40  # images in the picture, and those that δ is searched on


@dataclass(frozen=True, eq=False)
class Shift:
    """A universal perturbation.

    Attributes:
        label: The class that it is searched towards.
        delta: ``[C, H, W]``.
        shown: Images of other classes with it ``[N, C, H, W]``.
        answers: Of the model to those.
        fooled: Share of images that δ was not searched on which it sends to ``label``.
    """

    label: int
    delta: Tensor
    shown: Tensor
    answers: list[int]
    fooled: float


class UniversalExplorer(Explorer):
    """One perturbation δ for all images, searched towards a class within a radius that the reader chooses.

    Args:
        models: By the name to show, images in [0, 1] to logits.
        samples: Labelled images; half of them, at most 40, are searched on, the others measured.
        seed: Of which are searched on, and of where δ starts.
    """

    def __init__(self, models: Mapping[str, nn.Module], samples: Samples, *, seed: int = 0) -> None:
        if len(samples) < 2 * samples.num_classes:
            raise InputError(
                f"There are {len(samples)} samples. Allowed: two a class or more, so that δ can be tested."
            )
        self.models, self.samples, self.seed = {n: frozen(m) for n, m in models.items()}, samples, seed
        order = torch.randperm(len(samples), generator=stream(seed, "explore"))
        count = min(SEARCHED, len(samples) // 2)
        self.searched, self.held = order[:count], order[count:]
        super().__init__(
            {
                "model": W.SelectionSlider(options=list(models), description="Model"),
                "label": W.IntSlider(0, min=0, max=samples.num_classes - 1, description="Towards class"),
                "radius": W.FloatSlider(1.0, min=0.25, max=6, step=0.25, description="Radius C, L2 norm"),
                "steps": W.IntSlider(8, min=1, max=12, description="Ascent steps"),
            }
        )

    def compute(self, *, model: str, label: int, radius: float, steps: int) -> Shift:
        """Search δ and try it on images that it was not searched on."""
        chosen, target = self.models[model], torch.tensor([label])
        images, labels = self.samples.images, self.samples.labels
        with fast(chosen) as run:
            delta = universal(
                run, images[self.searched], labels[self.searched], target, radius=radius, steps=steps,
                rng=stream(self.seed, "start"),
            )  # fmt: skip
            fooled = fooling_rate(run, images[self.held], labels[self.held], target, delta).item()
        others = self.held[labels[self.held] != label][:SHOWN]
        shown = (images[others] + delta).clamp(0, 1)
        return Shift(label, delta[0], shown, predict(chosen, shown).argmax(1).tolist(), fooled)

    def figure(self, result: Shift) -> Figure:
        """δ on its own, purple brighter and orange darker, and images with it."""
        figure = Figure(figsize=(9, 1.9), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, len(result.shown)))
        delta = result.delta.mean(0)
        end = delta.abs().max().clamp(min=1e-6).item()
        left.imshow(delta.numpy(), cmap="PuOr", vmin=-end, vmax=end)
        left.set(xticks=[], yticks=[])
        left.set_title("δ", fontsize=10)
        answered_row(right, result.shown, result.answers, result.label)
        right.set_title(f"images + δ; ✕: taken for {result.label}", fontsize=10)
        return figure

    def describe(self, result: Shift) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        norm = result.delta.norm().item()
        alt = f"A universal perturbation towards class {result.label}, and images with it and the model's answers."
        caption = (
            f"One δ of norm {norm:.2g} sends {100 * result.fooled:.0f} % of the images it was not searched on to class "
            f"{result.label}."
        )
        return alt, caption, {"fooled": result.fooled, "norm": norm}
