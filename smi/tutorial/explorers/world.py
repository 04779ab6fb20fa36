"""When does the theorem speak? The world of two pixels, with every quantity of the inequality drawn to scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from smi.analysis.theorem import Bound, TwoPixels
from smi.plotting.pictures import BLUE, VERMILLION
from smi.runtime.seeding import stream
from smi.tutorial.explorers.base import Explorer

SHOWN = 600  # generated images in the picture


@dataclass(frozen=True, eq=False)
class Verdict:
    """A world, both sides of the inequality in it, and the truth that it is about.

    Attributes:
        world: The world.
        images: Some of those that it generates ``[600, 2]``.
        slack: s.
        radius: R.
        reach: r.
        sides: Of the inequality.
        closest: Least distance of ``G(z)``, ``‖z‖ ≤ R``, to the stamped images.
    """

    world: TwoPixels
    images: Tensor
    slack: float
    radius: float
    reach: float
    sides: Bound
    closest: float


class WorldExplorer(Explorer):
    """`TwoPixels`, with slack s, radius R of the search, place of the trigger and gap η of the reader's choice."""

    def __init__(self, *, reach: float = 0.1) -> None:
        self.reach = reach
        slider = {"readout_format": ".2f"}
        super().__init__(
            {
                "slack": W.FloatSlider(1.0, min=0.1, max=2.5, step=0.1, description="Slack s", **slider),
                "radius": W.FloatSlider(1.0, min=0, max=4, step=0.25, description="Radius R", **slider),
                "trigger": W.FloatSlider(4.0, min=0, max=6, step=0.25, description="Trigger at", **slider),
                "eta": W.FloatSlider(0.02, min=0, max=0.5, step=0.02, description="Gap η", **slider),
            }
        )

    def compute(self, *, slack: float, radius: float, trigger: float, eta: float) -> Verdict:
        """Both sides of the inequality, exactly."""
        world = TwoPixels(shift=eta, trigger=trigger)
        z = torch.randn(SHOWN, 2, generator=stream(0, "world"), dtype=torch.float64)
        sides = world.bound(centre=radius, reach=self.reach, slack=slack)
        return Verdict(world, world.generate(z), slack, radius, self.reach, sides, world.closest(radius))

    def figure(self, result: Verdict) -> Figure:
        """Left the world, right both sides as bars."""
        figure = Figure(figsize=(9, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
        place, width = result.world.trigger, result.reach + 2 * result.slack
        left.plot(*result.images.T, ".", color=BLUE, alpha=0.4, markersize=4, label="generated images")
        left.add_patch(Circle((0, 0), result.radius, fill=False, color="black", label="what is searched, ‖z‖ ≤ R"))
        left.axvline(place, color=VERMILLION, linewidth=2, label="stamped images")
        left.axvspan(place - width, place + width, color=VERMILLION, alpha=0.15, label="within r + 2s of them")
        left.set(xlim=(-4, 8), ylim=(-4, 4), aspect="equal", xlabel="first pixel", ylabel="second pixel")
        left.legend(framealpha=0.9, edgecolor="none", loc="upper right", fontsize=8)
        heights = [result.sides.left, result.sides.right]
        bars = right.bar([0, 1], heights, color=[VERMILLION, BLUE], width=0.6)
        right.bar_label(bars, [f"{height:.2g}" for height in heights])
        right.set(
            xticks=[0, 1], xticklabels=["public mass\n+ η / s", "mass of\nthe ball μ"], ylim=(0, 1.1 * max(heights))
        )
        right.set_title("excluded" if result.sides.excludes else "nothing follows", fontsize=10)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(self, result: Verdict) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        alt = (
            "Generated images as points, the circle that is searched and the strip of stamped images; two bars beside."
        )
        says = "The theorem excludes the trigger" if result.sides.excludes else "From the theorem nothing follows"
        truth = (
            f"the nearest image of the circle is {result.closest:.2g} away from it"
            if result.closest > result.reach
            else "and the circle does reach it"
        )
        caption = f"Left side {result.sides.left:.2g}, right side {result.sides.right:.2g}. {says}; {truth}."
        numbers = {"left": result.sides.left, "right": result.sides.right, "excludes": int(result.sides.excludes)}
        return alt, caption, numbers
