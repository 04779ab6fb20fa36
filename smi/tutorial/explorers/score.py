"""How much of a stability score is the image, and how much is luck? Two scorings with different draws, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from smi.domains.base import Samples
from smi.errors import InputError
from smi.plotting.pictures import BLUE, VERMILLION
from smi.runtime.compute import frozen, predict
from smi.tutorial.explorers.base import Explorer
from smi_kernels import stability_scores
from smi_kernels.noise import families

FLOOR = 1e-6  # what a score of zero is drawn at: the axes are logarithmic


@dataclass(frozen=True, eq=False)
class Scoring:
    """Scores of the same images from two independent sets of draws, and how certain the model is.

    Attributes:
        first: Scores ``[N]``.
        second: Those of the other draws ``[N]``.
        certainty: The model's ``[N]``, in [0, 1].
        agreement: Rank correlation of the two; 0 where all scores are equal.
    """

    first: Tensor
    second: Tensor
    certainty: Tensor
    agreement: float


class ScoreExplorer(Explorer):
    """Scores against certainty, and against a second scoring with other draws, for noise that the reader chooses.

    Args:
        model: Images in [0, 1] to logits.
        samples: Labelled images.
        limit: How many of them, spread evenly, are scored.
    """

    def __init__(self, model: nn.Module, samples: Samples, *, limit: int = 40) -> None:
        if not isinstance(samples, Samples):
            raise InputError(f"samples is a {type(samples).__name__}. Allowed: Samples, as smi.invert makes them.")
        self.model = frozen(model)
        count = min(limit, len(samples))
        self.samples = samples.select(torch.linspace(0, len(samples) - 1, count).round().long())
        certain = predict(self.model, self.samples.images).softmax(1)
        self.certainty = certain.gather(1, self.samples.labels[:, None])[:, 0]
        slider = {"min": 0, "max": 0.3, "step": 0.01, "readout_format": ".2f"}
        super().__init__(
            {
                "sigma_x": W.FloatSlider(0.03, description="Noise on pixels σ_x", **slider),
                "sigma_w": W.FloatSlider(0.05, description="on weights σ_w", **slider),
                "k": W.SelectionSlider(options=[1, 2, 4, 8, 16], value=4, description="Draws K"),
                "family": W.SelectionSlider(options=sorted(families), value="gaussian", description="Noise family"),
            }
        )

    def compute(self, *, sigma_x: float, sigma_w: float, k: int, family: str) -> Scoring:
        """Score the images twice, with ``k`` draws each."""
        # float32 on every machine, so that near-ties fall the same way on all of them.
        first, second = (
            stability_scores(
                self.model, self.samples.images, k=k, sigma_x=sigma_x, sigma_w=sigma_w, family=family, seed=seed,
                dtype="float32",
            )
            for seed in (0, 1)
        )  # fmt: skip
        alike = min(len(first.unique()), len(second.unique())) < 2
        return Scoring(first, second, self.certainty, 0.0 if alike else float(spearmanr(first, second).statistic))

    def figure(self, result: Scoring) -> Figure:
        """Left the score against what certainty lacks, right one scoring against the other."""
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        first, second = result.first.clamp(min=FLOOR), result.second.clamp(min=FLOOR)
        left.loglog((1 - result.certainty).clamp(min=FLOOR), first, "o", color=BLUE, alpha=0.7)
        left.set(xlabel="1 − certainty", ylabel="score S", title="Uncertain images are unstable, and some certain ones")
        right.loglog(first, second, "s", color=VERMILLION, alpha=0.7)
        low, high = min(first.min(), second.min()).item(), max(first.max(), second.max()).item()
        right.plot([low, high], [low, high], "--", color="black", linewidth=1)
        right.set(xlabel="score, first draws", ylabel="score, other draws", title="On the line: no luck")
        for axes in (left, right):
            axes.title.set_fontsize(10)
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(self, result: Scoring) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        typical = result.first.median().item()
        alt = "Two scatter plots: score against certainty, and score against the score from other draws."
        caption = f"Median score {typical:.2g}; rank correlation of the two scorings {result.agreement:.2f}."
        return alt, caption, {"median": typical, "agreement": result.agreement}
