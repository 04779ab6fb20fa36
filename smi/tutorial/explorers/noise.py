"""What does a noise family draw, and which counters does one tile of a kernel need for it?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ipywidgets as W
import torch
from matplotlib.figure import Figure
from torch import Tensor

from smi.plotting.pictures import BLUE
from smi.tutorial.explorers.base import Explorer
from smi_kernels.noise import INDEPENDENT, PARAMETERS, draw, families

SIZE = 32  # rows and columns of the weight matrix that is shown
SEED = 7


@dataclass(frozen=True, eq=False)
class Drawn:
    """Noise for one weight matrix.

    Attributes:
        family: Its name.
        noise: ``[32, 32]``.
        rank: Of the matrix.
        tile: Rows and columns of a tile.
        counters: That a tile needs, of 128 random bits each; None for families that are built of fewer values.
    """

    family: str
    noise: Tensor
    rank: int
    tile: int
    counters: int | None


class NoiseExplorer(Explorer):
    """The noise of a draw for a weight matrix of 32 × 32, cut into the tiles that a kernel works on."""

    def __init__(self) -> None:
        super().__init__(
            {
                "family": W.SelectionSlider(options=sorted(families), value="gaussian", description="Family"),
                "k": W.IntSlider(0, min=0, max=7, description="Draw k"),
                "tile": W.SelectionSlider(options=[4, 8, 16, 32], value=16, description="Tile"),
            }
        )

    def compute(self, *, family: str, k: int, tile: int) -> Drawn:
        """Draw, and count."""
        kind = families[family]
        noise = draw(kind, {0: (SIZE, SIZE)}, seed=SEED, k=k, stream=PARAMETERS)[0]
        counters = None
        if kind.structure == INDEPENDENT:
            element = torch.arange(SIZE * SIZE).view(SIZE, SIZE)[:tile, :tile]
            counters = len((element // kind.elements).unique())
        return Drawn(family, noise, int(torch.linalg.matrix_rank(noise)), tile, counters)

    def figure(self, result: Drawn) -> Figure:
        """The matrix with its tiles, and how its values are distributed."""
        figure = Figure(figsize=(8, 3.4), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.imshow(result.noise.numpy(), cmap="PuOr", vmin=-3, vmax=3)
        for edge in range(0, SIZE + 1, result.tile):
            left.axhline(edge - 0.5, color="black", linewidth=0.8)
            left.axvline(edge - 0.5, color="black", linewidth=0.8)
        left.set(xticks=[], yticks=[], xlabel="inputs", ylabel="outputs")
        left.set_title(f"{result.family}: noise on a weight matrix", fontsize=10)
        right.hist(result.noise.flatten().numpy(), bins=torch.linspace(-4, 4, 41).tolist(), color=BLUE)
        right.set(xlabel="value", ylabel="elements")
        right.set_title("mean 0, variance 1", fontsize=10)
        right.spines[["top", "right"]].set_visible(False)
        return figure

    def describe(self, result: Drawn) -> tuple[str, str, dict[str, Any]]:
        """Alternative text, caption and numbers."""
        alt = "Noise on a matrix of 32 by 32 weights as colours with a grid of tiles, and a histogram of its values."
        needs = (
            f"{result.counters} counters of 128 random bits"
            if result.counters is not None
            else f"the values of its {result.tile} rows and {result.tile} columns"
        )
        caption = (
            f"Rank {result.rank} of {SIZE}, {len(result.noise.unique())} different values. A tile of {result.tile} × "
            f"{result.tile} needs {needs}, and nothing from other tiles."
        )
        return alt, caption, {"rank": result.rank, "counters": result.counters or 0}
